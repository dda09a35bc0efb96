"""Where a stage's time goes."""

import time

import pytest
import torch

from lopt_pp.metrics.clock import StageClock
from lopt_pp.metrics.records import COMPUTE_PHASES, PHASES


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
    record = clock.read()
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
    clock.read()
    with clock("backward"):
        now.now += 0.5
    record = clock.read()
    assert (record["forward_seconds"], record["backward_seconds"], record["step_seconds"]) == (0.0, 0.5, 0.5)


def test_computing_is_what_is_not_waiting() -> None:
    assert set(PHASES) - set(COMPUTE_PHASES) == {"wait_receive", "wait_send", "schedule", "probe", "eval"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_device_is_timed() -> None:
    clock = StageClock(torch.device("cuda"))
    with clock("forward"):
        torch.cuda._sleep(50_000_000)  # Cycles of the device; the call returns at once.
    record = clock.read()
    assert 0.005 < record["forward_seconds"] <= record["step_seconds"]
    assert record["backward_seconds"] == 0
