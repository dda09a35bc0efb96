"""Which steps are made: deciders that are asked to stop end before the same step, and take back no decision."""

import threading

import torch.distributed as dist

from lopt_pp.distributed.shutdown import StopCoordinator, ask_to_stop, stop_reason


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
    ask_to_stop(store, "SIGUSR1")
    ask_to_stop(store, "SIGTERM")
    end = walk(stop_signal, 1_000_000_000)
    assert stop_reason(store) == "SIGUSR1"
    assert decided == 7 <= end and not stop_signal.runs(end) and not stop_signal.runs(end + 1)
    assert all(stop_signal.runs(step) for step in range(end))
    stop_signal.close(store)


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
