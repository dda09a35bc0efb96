"""The processes of a start find each other in a store that is full of what earlier starts have left."""

import threading
from datetime import timedelta

import torch.distributed as dist

from lopt_pp.distributed.restarts import agree_on_restart

TIMEOUT = timedelta(seconds=30)


def connect(server: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=TIMEOUT)


def start(server: dist.TCPStore, size: int) -> list[int]:
    """The numbers that the ranks of a new start agree on."""
    numbers = [0] * size

    def join(rank: int) -> None:
        numbers[rank] = agree_on_restart(connect(server), rank, size, TIMEOUT)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in reversed(range(size))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return numbers


def test_restarts_are_numbered() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    assert [start(server, 3) for _ in range(3)] == [[0] * 3, [1] * 3, [2] * 3]


def test_those_who_died_on_the_way_do_not_confuse_it() -> None:
    """A rank that presented itself and died; one that died after the answer; a rank 0 that waited for others."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    dead = connect(server)
    dead.queue_push("arrivals", '{"name": "dead"}')
    dead.queue_push("arrivals", '{"rank": 1, "restart": 0}')
    dead.add("starts", 1)
    assert start(server, 3) == [1] * 3
    assert server.queue_len("arrivals") == 0


def test_what_nccl_left_of_an_earlier_start_is_gone_before_anybody_makes_a_group() -> None:
    """Its monitor looks at the store itself, below all prefixes, and ends a process that finds such a word."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=TIMEOUT)
    assert start(server, 2) == [0, 0]
    # As ProcessGroupNCCL does: the rank, as an int of C, in the store that all prefixes stand on.
    connect(server).set("exception_dump", "\x01\0\0\0")
    found = []

    def join(rank: int) -> None:
        store = connect(server)
        agree_on_restart(store, rank, 2, TIMEOUT)
        found.append(store.check(["exception_dump"]))

    threads = [threading.Thread(target=join, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False, False]
