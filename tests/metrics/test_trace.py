"""What the intervals of all stages tell."""

import json
from pathlib import Path

import pytest
import torch

from lopt_pp.metrics.clock import StageClock
from lopt_pp.metrics.records import Interval
from lopt_pp.metrics.trace import QueueLengths, TraceFile


def sending(*moments: float) -> list[Interval]:
    """A stage that has its messages ready at these moments, and hands each on 0.1 s later."""
    return [
        part for moment in moments for part in (("forward", moment - 0.5, moment), ("wait_send", moment, moment + 0.1))
    ]


def receiving(*moments: float) -> list[Interval]:
    """A stage that has taken its messages at these moments."""
    return [("wait_receive", moment - 0.2, moment) for moment in moments]


def test_a_stage_that_takes_at_once_leaves_no_queue() -> None:
    queues = QueueLengths()
    for step in range(3):
        start = 10.0 * step
        assert queues.mean(0, 0, sending(start + 1, start + 2), receiving(start + 1.2, start + 2.2)) == 0.0


def test_a_queue_grows_while_the_next_stage_is_slow() -> None:
    """Messages at 1, 2, 3, 4; taken at 1.5, 4.5, 7.5, 10.5: 0, 0, 1, 2 wait. Then 5..8, taken 13.5..: 3, 3, 4, 5."""
    queues = QueueLengths()
    assert queues.mean(0, 0, sending(1, 2, 3, 4), receiving(1.5, 4.5, 7.5, 10.5)) == 3 / 4
    assert queues.mean(0, 0, sending(5, 6, 7, 8), receiving(13.5, 16.5, 19.5, 22.5)) == (2 + 3 + 4 + 4) / 4


def test_boundaries_and_replicas_are_counted_apart() -> None:
    queues = QueueLengths()
    assert queues.mean(0, 0, sending(1, 2), receiving(8, 9)) == 0.5
    assert queues.mean(0, 1, sending(1, 2), receiving(1.5, 2.5)) == 0.0
    assert queues.mean(1, 0, sending(1, 2), receiving(1.5, 2.5)) == 0.0
    assert queues.mean(0, 0, [("schedule", 0.0, 1.0)], []) is None


def test_clocks_that_are_a_little_off_make_no_negative_queue() -> None:
    assert QueueLengths().mean(0, 0, sending(1, 2), receiving(0.9, 1.9)) == 0.0


def records(step: int) -> list[list[dict[str, object]]]:
    """Two stages with two microbatches, in two replicas; the step begins at `100 + step`."""
    start = 100.0 + step
    first: list[Interval] = []
    second: list[Interval] = []
    for microbatch in range(2):
        at = start + microbatch / 4
        first += [("wait_receive", at, at), ("forward", at, at + 0.05), ("wait_send", at + 0.05, at + 0.06)]
        first += [("backward", at + 0.06, at + 0.2)]
        second += [
            ("wait_receive", at, at + 0.065),
            ("forward", at + 0.065, at + 0.1),
            ("backward", at + 0.1, at + 0.2),
        ]
    first.append(("optimizer", start + 0.45, start + 0.5))
    second.append(("optimizer", start + 0.45, start + 0.55))
    return [[{"intervals": first}, {"intervals": first}], [{"intervals": second}, {"intervals": second}]]


@pytest.fixture
def trace(tmp_path: Path) -> dict:
    file = TraceFile(tmp_path / "trace.json", range(3, 5), ["stage 0: layers 0-1", "stage 1: layers 2-3"], {"run": "x"})
    for step in range(1, 7):
        file.step(step, [], records(step))
        assert (tmp_path / "trace.json").exists() == (step >= 4)
    file.end()
    return json.loads((tmp_path / "trace.json").read_text())


def test_a_trace_has_a_row_for_each_stage(trace: dict) -> None:
    events = trace["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(r, k): f"stage {k}: layers {2 * k}-{2 * k + 1}" for r in (0, 1) for k in (0, 1)}
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["args"]["step"] for e in spans} == {3, 4}
    first = [e for e in spans if (e["pid"], e["tid"], e["args"]["step"]) == (0, 0, 4)]
    assert [e["name"] for e in first] == [*["receive", "forward", "send", "backward"] * 2, "optimizer"]
    assert [e["args"].get("microbatch") for e in first] == [1, 1, 1, 1, 2, 2, 2, 2, None]
    # Microseconds since the first moment of the window.
    assert [first[0]["ts"], first[1]["dur"], first[-1]["ts"]] == pytest.approx([1e6, 5e4, 1.45e6])
    assert trace["otherData"] == {"run": "x"}


def test_arrows_join_sender_and_receiver(trace: dict) -> None:
    events = trace["traceEvents"]
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert len(starts) == 8 and starts.keys() == ends.keys()
    for key, start in starts.items():
        assert (start["tid"], ends[key]["tid"]) == (0, 1) and start["pid"] == ends[key]["pid"]
        # Each end lies in a span of its row, which is what a viewer ties it to.
        for arrow in (start, ends[key]):
            holding = [
                e
                for e in events
                if e["ph"] == "X"
                and (e["pid"], e["tid"]) == (arrow["pid"], arrow["tid"])
                and e["ts"] <= arrow["ts"] <= e["ts"] + e["dur"]
            ]
            assert {"send" if arrow is start else "receive"} <= {e["name"] for e in holding}


def test_a_run_that_ends_within_the_window_leaves_what_it_has(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "trace.json", range(3, 50), ["a", "b"], {})
    for step in range(1, 5):
        file.step(step, [], records(step))
    file.end()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {e["args"]["step"] for e in events if e["ph"] == "X"} == {3, 4}


def test_a_run_that_ends_before_the_window_leaves_no_trace(tmp_path: Path) -> None:
    file = TraceFile(tmp_path / "trace.json", range(3, 50), ["a", "b"], {})
    file.step(1, [], records(1))
    file.end()
    assert not (tmp_path / "trace.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_intervals_of_a_gpu_are_on_the_clock_of_the_host() -> None:
    import time

    clock = StageClock(torch.device("cuda"))
    begun = time.perf_counter()
    with clock("forward"):
        torch.cuda._sleep(50_000_000)
    (_, begin, end) = clock.end_step().record()["intervals"][0]
    assert begun - 0.001 < begin < end < time.perf_counter() + 0.001
