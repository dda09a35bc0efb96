"""Reports the records of steps once their times are known, so that training never waits for the device to tell them."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator

from lopt_pp.metrics.clock import StepTimes
from lopt_pp.metrics.records import Record

_PATIENCE = 2.0
"""Seconds in which the times of steps before an error are waited for."""


class LateReports:
    """Takes the parts of records, and reports each record once its times are known.

    Args:
        report: called with each record.
    """

    def __init__(self, report: Callable[[Record], None]) -> None:
        self._report = report
        self._waiting: deque[tuple[Record, StepTimes, Record]] = deque()

    def __call__(self, before: Record, times: StepTimes, after: Record) -> None:
        """Takes what comes before the times, the times, and what comes after."""
        self._waiting.append((before, times, after))
        self.deliver_known()

    def deliver_known(self) -> None:
        """Reports, in order, what can be reported without a wait."""
        while self._waiting and self._waiting[0][1].is_known():
            self.deliver()

    def deliver(self) -> None:
        """Reports the first one that was not reported yet; waits for its times."""
        before, times, after = self._waiting.popleft()
        self._report(before | times.record() | after)

    def __len__(self) -> int:
        """How many are not reported yet."""
        return len(self._waiting)


@contextlib.contextmanager
def late_reports(report: Callable[[Record], None]) -> Iterator[LateReports]:
    """Reports each record exactly once, in the order in which they come.

    Args:
        report: called with each record.

    Returns:
        A context of what takes the parts of a record. When it ends, by an error too, all records are reported.
    """
    tell = LateReports(report)
    try:
        yield tell
    except BaseException:
        # Those steps have been made, and their events mostly come. They are not waited for without an end: the device
        # may stand behind what failed, and whoever waits for the error must hear of it.
        until = time.monotonic() + _PATIENCE
        with contextlib.suppress(Exception):  # Of a device that has failed itself; it is not to hide the first one.
            tell.deliver_known()
            while tell and time.monotonic() < until:
                time.sleep(0.01)
                tell.deliver_known()
        raise
    while tell:
        tell.deliver()
