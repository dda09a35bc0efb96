"""Reports the records of steps once their times are known, so that training never waits for the device to tell them."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

from lopt_pp.metrics.clock import StepTimes
from lopt_pp.metrics.records import Record


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
        # Those steps have been made, and their events come without what failed. A device that has failed itself tells
        # no times, and its own error is not to hide the first one.
        with contextlib.suppress(RuntimeError):
            while waiting:
                deliver()
        raise
    while waiting:
        deliver()
