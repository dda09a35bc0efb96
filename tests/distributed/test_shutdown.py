"""Which steps are made: deciders that are asked to stop end before the same step, and take back no decision."""

import threading

import pytest
import torch.distributed as dist

from lopt_pp.distributed.shutdown import (
    EVALUATE,
    SAVE,
    RunLength,
    StopCoordinator,
    ask_for,
    ask_to_finish,
    ask_to_stop,
    await_end,
    stop_reason,
)


def walk(stop_signal: StopCoordinator, steps: int) -> int:
    """Makes steps until the run is stopped or `steps` are made; their number."""
    step = 0
    while step < steps and stop_signal.runs(step):
        step += 1
    return step


def test_without_a_request_every_step_is_made() -> None:
    store = dist.HashStore()
    stop_signal = StopCoordinator(store, 0, [0], 5)
    assert all(stop_signal.is_decided(step) and stop_signal.runs(step) for step in range(5, 100))
    stop_signal.close(store)
    ask_to_stop(store, "SIGTERM")  # Too late.
    assert stop_signal.runs(100)


def test_a_request_ends_it_before_the_first_step_that_is_not_decided() -> None:
    store = dist.HashStore()
    stop_signal = StopCoordinator(store, 0, [0], 0)
    decided = walk(stop_signal, 7)
    # The first request for a reason is told apart, so that one process says it and not all of them.
    assert [ask_to_stop(store, name) for name in ("SIGUSR1", "SIGUSR1", "SIGTERM")] == [True, False, True]
    end = walk(stop_signal, 1_000_000_000)
    assert stop_reason(store) == "SIGUSR1"
    assert decided == 7 <= end and not stop_signal.runs(end) and not stop_signal.runs(end + 1)
    assert all(stop_signal.runs(step) for step in range(end))
    stop_signal.close(store)


def test_an_evaluation_ends_before_the_first_microbatch_that_is_not_decided() -> None:
    store = dist.HashStore()
    stop_signal = StopCoordinator(store, 0, [0], 0)
    assert walk(stop_signal, 4) == 4 and stop_signal.runs(3, 1) and stop_signal.runs(3, 2)
    ask_to_stop(store, "SIGTERM")
    assert await_end(store) == 4
    assert stop_signal.runs(3, 2) and not stop_signal.runs(3, 3) and not stop_signal.runs(4)
    stop_signal.close(store)


def test_the_farthest_decider_is_in_an_evaluation() -> None:
    store = dist.HashStore()
    near, far = (StopCoordinator(store, rank, [0, 1], 0) for rank in (0, 1))
    assert walk(near, 1) == 1 and walk(far, 2) == 2 and far.runs(1, 1)
    ask_to_stop(store, "SIGTERM")
    assert await_end(store) == 2
    for stop_signal in (near, far):
        assert [stop_signal.runs(*place) for place in ((1, 0), (1, 1), (1, 2), (2, 0))] == [True, True, False, False]


def test_a_run_finishes_with_the_step_after_the_farthest_one() -> None:
    """Which nobody has begun, whose evaluation is made, and which is known to be the last before it begins."""
    store = dist.HashStore()
    lengths = [RunLength(9), RunLength(9)]
    near, far = (StopCoordinator(store, rank, [0, 1], 0, lengths[rank]) for rank in (0, 1))
    assert walk(near, 1) == 1 and walk(far, 2) == 2 and far.runs(1, 1)
    ask_to_finish(store, "that is enough")
    ask_to_stop(store, "SIGTERM")
    assert await_end(store) == 3 and stop_reason(store) == "that is enough"
    for stop_signal, length in zip((near, far), lengths, strict=True):
        assert [stop_signal.runs(*place) for place in ((1, 2), (2, 0), (2, 7), (3, 0))] == [True, True, True, False]
        assert length.is_early and length.is_last(3) and not length.is_last(9)


def test_what_is_asked_for_is_done_after_a_step_that_nobody_has_begun() -> None:
    """Each time it is asked for; the end is decided in its turn."""
    store = dist.HashStore()
    lengths = [RunLength(9), RunLength(9)]
    near, far = (StopCoordinator(store, rank, [0, 1], 0, lengths[rank]) for rank in (0, 1))
    assert walk(near, 1) == 1 and walk(far, 2) == 2
    ask_for(store, EVALUATE)
    store.wait(["request/0/0", "request/0/1"])
    # Whoever comes there waits until it is agreed.
    assert far.runs(2) and near.runs(2) and far.runs(3)
    assert [length.besides(2) for length in lengths] == [EVALUATE] * 2
    ask_for(store, SAVE)
    ask_for(store, EVALUATE)
    ask_to_finish(store, "that is enough")
    assert await_end(store) == 5 and near.runs(4) and far.runs(4) and not near.runs(5)
    for length in lengths:
        assert [length.besides(step) for step in range(6)] == [0, 0, EVALUATE, 0, EVALUATE | SAVE, 0]


@pytest.mark.parametrize("made", [7, 8, 9])
def test_a_run_that_has_no_further_step_finishes_as_planned(made: int) -> None:
    """Or one whose next step is the last."""
    store, length = dist.HashStore(), RunLength(9)
    stop_signal = StopCoordinator(store, 0, [0], 0, length)
    assert walk(stop_signal, made) == made
    ask_to_finish(store, "that is enough")
    assert await_end(store) == (8 if made == 7 else None)
    assert stop_signal.runs(7) and stop_signal.runs(8) == (made > 7)
    assert length.is_early == (made == 7) and length.is_last(8 if made == 7 else 9)
    stop_signal.close(store)


def test_nothing_is_made_of_a_run_that_was_asked_to_stop_before_it_began() -> None:
    """But for the record of the evaluation before its first step."""
    store = dist.HashStore()
    ask_to_stop(store, "SIGTERM")
    stop_signal = StopCoordinator(store, 0, [0], 0)
    assert await_end(store) == 0
    assert stop_signal.runs(-1) and not stop_signal.runs(-1, 1) and not stop_signal.runs(0)


def test_a_run_that_has_made_all_its_steps_has_no_other_end() -> None:
    store = dist.HashStore()
    StopCoordinator(store, 0, [0], 0).close(store)
    ask_to_stop(store, "SIGINT")
    assert await_end(store) is None


def test_deciders_agree() -> None:
    """Each in a thread of its own, as far ahead of the others as it is let."""
    store = dist.HashStore()
    deciders = [0, 2, 4]
    courses = [StopCoordinator(store, rank, deciders, 0) for rank in deciders]
    for stop_signal, ahead in zip(courses, (3, 9, 1), strict=True):
        assert walk(stop_signal, ahead) == ahead
    ends: dict[int, int] = {}

    def go(number: int) -> None:
        ends[number] = walk(courses[number], 1_000_000_000)

    threads = [threading.Thread(target=go, args=(number,)) for number in range(3)]
    for thread in threads[:2]:
        thread.start()
    ask_to_stop(store, "SIGTERM")
    threads[2].start()
    for thread in threads:
        thread.join()
    assert len(set(ends.values())) == 1 and ends[0] >= 9
