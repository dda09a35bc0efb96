"""Putting the clocks of several processes together."""

import random
import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lopt_pp.distributed.world import World
from lopt_pp.metrics.clock_sync import Offset, estimate, measure_offset


@pytest.mark.parametrize("true_offset", [0.0, 12.5, -3000.0])
def test_the_error_is_within_its_bound(true_offset: float) -> None:
    """Whatever the two ways take, and however much they differ."""
    draw = random.Random(1)
    for _ in range(200):
        answers, now = [], 100.0
        for _ in range(5):
            there, back = draw.expovariate(50), draw.expovariate(200)
            answers.append((now, now + there + true_offset, now + there + back))
            now += 1.0
        offset = estimate(answers, same_machine=False)
        assert abs(offset.seconds - true_offset) <= offset.error + 1e-9
        assert offset.error <= min(answered - asked for asked, _, answered in answers) / 2 + 1e-9


def test_one_machine_has_one_clock_unless_proven_otherwise() -> None:
    near, far = [(10.0, 10.0002, 10.001)], [(10.0, 17.0, 10.001)]
    assert estimate(near, same_machine=True) == Offset(0.0, 0.0)
    assert estimate(near, same_machine=False).seconds == pytest.approx(-0.0003)
    assert estimate(far, same_machine=True).seconds == pytest.approx(6.9995)


def test_processes_of_one_machine_are_on_one_clock() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    found: dict[int, Offset] = {}

    def measure(rank: int) -> None:
        own = store.clone()  # type: ignore[attr-defined]
        found[rank] = measure_offset(World(rank, 3, torch.device("cpu"), "gloo", own, own))

    threads = [threading.Thread(target=measure, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {rank: Offset() for rank in range(3)}


def test_a_process_with_another_clock_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's clock is 1000 s behind rank 0's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))
    clock, found = time.perf_counter, {}

    def shifted() -> float:
        return clock() - (1000.0 if threading.current_thread().name == "rank 1" else 0.0)

    monkeypatch.setattr(time, "perf_counter", shifted)

    def measure(rank: int) -> None:
        own = store.clone()  # type: ignore[attr-defined]
        found[rank] = measure_offset(World(rank, 2, torch.device("cpu"), "gloo", own, own))

    threads = [threading.Thread(target=measure, args=(rank,), name=f"rank {rank}") for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == Offset()
    assert abs(found[1].seconds - 1000.0) <= found[1].error < 30
