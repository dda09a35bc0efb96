"""The processes of an attempt find each other in a store that is full of what earlier attempts have left."""

import threading
from datetime import timedelta

import torch.distributed as dist

from lopt_pp.attempt import agree_on_attempt

TIMEOUT = timedelta(seconds=30)


def connect(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=TIMEOUT)


def attempt(server: dist.TCPStore, size: int) -> list[int]:
    """The numbers that the ranks of a new attempt agree on."""
    numbers = [0] * size

    def join(rank: int) -> None:
        numbers[rank] = agree_on_attempt(connect(server), rank, size, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return numbers


def test_attempts_are_numbered() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    assert [attempt(server, 3) for _ in range(3)] == [[1] * 3, [2] * 3, [3] * 3]


def test_those_who_died_on_the_way_do_not_confuse_it() -> None:
    """A rank that presented itself and died; one that died after the answer; a rank 0 that waited for others."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    dead = connect(server)
    dead.queue_push("arrivals", '{"name": "dead"}')
    dead.queue_push("arrivals", '{"rank": 1, "attempt": 1}')
    dead.add("attempts", 1)
    assert attempt(server, 3) == [2] * 3
    assert server.queue_len("arrivals") == 0
