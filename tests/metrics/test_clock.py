"""Where a stage's time goes."""

import math
import time

import pytest
import torch

from lopt_pp.metrics.clock import StageClock
from lopt_pp.metrics.records import COMPUTE_PHASES, PHASES
from lopt_pp.training.late_reports import late_reports


class Time:
    """A clock that goes on only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Time:
    now = Time()
    monkeypatch.setattr(time, "perf_counter", now)
    return now


def test_a_clock_sums_each_phase_of_a_step(now: Time) -> None:
    clock = StageClock(torch.device("cpu"))
    for seconds in (0.25, 0.5):
        for weight, phase in enumerate(PHASES, 1):
            with clock(phase):
                now.now += weight * seconds
        now.now += 2.0  # Data and bookkeeping.
    record = clock.end_step().record()
    assert [phase for phase, *_ in record["intervals"]] == [*PHASES, *PHASES]
    assert record.pop("intervals")[1] == ("forward", 100.25, 100.75)
    assert record == {
        "wait_receive_seconds": 0.75,
        "forward_seconds": 1.5,
        "backward_seconds": 2.25,
        "optimizer_seconds": 3.0,
        "wait_send_seconds": 3.75,
        "schedule_seconds": 4.5,
        "probe_seconds": 5.25,
        "eval_seconds": 6.0,
        "step_seconds": 31.0,
    }


def test_reading_begins_another_step(now: Time) -> None:
    clock = StageClock(torch.device("cpu"))
    with clock("forward"):
        now.now += 1.0
    clock.end_step().record()
    with clock("backward"):
        now.now += 0.5
    record = clock.end_step().record()
    assert (record["forward_seconds"], record["backward_seconds"], record["step_seconds"]) == (0.0, 0.5, 0.5)


def test_computing_is_what_is_not_waiting() -> None:
    assert set(PHASES) - set(COMPUTE_PHASES) == {"wait_receive", "wait_send", "schedule", "probe", "eval"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_device_is_timed() -> None:
    clock = StageClock(torch.device("cuda"))
    with clock("forward"):
        torch.cuda._sleep(50_000_000)  # Cycles of the device; the call returns at once.
    times = clock.end_step()
    assert not times.is_known(), "the end of a step has waited for the device"
    record = times.record()
    assert 0.005 < record["forward_seconds"] <= record["step_seconds"]
    assert record["backward_seconds"] == 0


class Event:
    """An event of a device that is done with something when the test says so."""

    now: Time
    done_until = 100.0
    waits = 0

    def __init__(self, enable_timing: bool) -> None:
        self.moment = 0.0

    def record(self) -> None:
        self.moment = Event.now.now + 0.5  # The device is half a second behind.

    def query(self) -> bool:
        return self.moment <= Event.done_until

    def synchronize(self) -> None:
        Event.waits += 1
        Event.done_until = max(Event.done_until, self.moment)

    def elapsed_time(self, other: "Event") -> float:
        assert self.query() and other.query(), "the device is asked before it is done"
        return (other.moment - self.moment) * 1000


def test_a_step_on_a_gpu_ends_without_a_wait_and_is_reported_later(now: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    Event.now, Event.done_until, Event.waits = now, 0.0, 0
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StageClock(torch.device("cuda"))
    assert Event.waits == 1, "the first moment is joined to the host's clock"
    reported: list[dict] = []
    with late_reports(reported.append) as tell:
        for step in range(4):
            with clock("forward"):
                now.now += 1.0
            now.now += 0.25
            Event.done_until = now.now  # All of the step before, and not the end of this one.
            tell({"step": step}, clock.end_step(), {})
            assert [record["step"] for record in reported] == list(range(step)) and Event.waits == 1
    assert Event.waits == 2, "the last step is waited for"
    assert [record["step"] for record in reported] == [0, 1, 2, 3]
    for record in reported[1:]:
        assert (record["forward_seconds"], record["step_seconds"]) == pytest.approx((1.0, 1.25))
        ((phase, begin, end),) = record["intervals"]
        assert phase == "forward" and end - begin == pytest.approx(1.0)


def test_an_error_loses_no_record_of_a_step_that_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    class Late:
        def __init__(self, number: int, fails: bool = False, unknown: float = 3) -> None:
            self.number, self.fails, self.unknown = number, fails, unknown

        def is_known(self) -> bool:
            self.unknown -= 1
            return self.unknown < 0

        def record(self) -> dict:
            if self.fails:
                raise RuntimeError("the device is gone")
            return {"seconds": self.number}

    reported: list[dict] = []
    with pytest.raises(ValueError, match="the next step"), late_reports(reported.append) as tell:
        tell({"step": 1}, Late(1), {})
        tell({"step": 2}, Late(2), {})
        raise ValueError("the next step")
    assert reported == [{"step": 1, "seconds": 1}, {"step": 2, "seconds": 2}]
    with pytest.raises(ValueError, match="first"), late_reports(reported.append) as tell:
        tell({"step": 3}, Late(3, fails=True), {})
        raise ValueError("the first error")
    # The device stands behind what failed: the error is not held up.
    monkeypatch.setattr("lopt_pp.training.late_reports._PATIENCE", 0.0)
    with pytest.raises(ValueError, match="first"), late_reports(reported.append) as tell:
        tell({"step": 4}, Late(4, unknown=math.inf), {})
        raise ValueError("the first error")
    assert [record["step"] for record in reported] == [1, 2]
