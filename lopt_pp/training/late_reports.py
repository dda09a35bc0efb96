"""Reports the records of steps once their times are known, so that training never waits for the device to tell them."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from lopt_pp.metrics.clock import StepTimes
from lopt_pp.metrics.records import Record

_PATIENCE = 2.0
"""Seconds in which the times of steps before an error are waited for."""


@contextlib.contextmanager
def late_reports(report: Callable[[Record], None]) -> Iterator[Callable[[Record, StepTimes, Record], None]]:
    """Reports each record exactly once, in the order in which they come.

    Args:
        report: called with each record.

    Returns:
        A context of what takes the parts of a record: what comes before the times, the times, and what comes after.
        When it ends, by an error too, all records are reported.
    """
    waiting: deque[tuple[Record, StepTimes, Record]] = deque()

    def deliver() -> None:
        before, times, after = waiting.popleft()
        report(before | times.record() | after)

    def tell(before: Record, times: StepTimes, after: Record) -> None:
        waiting.append((before, times, after))
        while waiting and waiting[0][1].is_known():
            deliver()

    try:
        yield tell
    except BaseException:
        # Those steps have been made, and their events mostly come. They are not waited for without an end: the device
        # may stand behind what failed, and whoever waits for the error must hear of it.
        until = time.monotonic() + _PATIENCE
        with contextlib.suppress(Exception):  # Of a device that has failed itself; it is not to hide the first one.
            while waiting and (waiting[0][1].is_known() or time.monotonic() < until):
                if waiting[0][1].is_known():
                    deliver()
                else:
                    time.sleep(0.01)
        raise
    while waiting:
        deliver()
