"""What a slow link between two stages costs: delay, and a rate that one activation per microbatch just fits into.

    python -m benchmarks.network.slow_link [--quick] [--output link.json]          (Linux; as root)

Two ranks are in two network namespaces, joined by a link in user space (benchmarks/network/emulated_link.py) whose
delay and rate are set for each run; all traffic between them crosses it, rendezvous included. Each rank holds one
stage, run by the loop and the stream that train a model, over gloo. The stages' compute is a fixed sleep, so that the
link is what is measured. Where such a link is not possible the benchmark says why and measures nothing.

Beside it, over the same link with the same sleeps and messages: PyTorch's 1F1B, whose gradients travel back.

Columns:

  one way    the link's delay, in milliseconds. Back takes as long.
  MB/s       the link's rate each way. The limited one is --headroom times what one activation per microbatch's time
             needs, TCP's headers included.
  depth      --queue_depth of the stream: 2, its default, and the depth of the rule in that flag's help,
             2 x one-way delay / microbatch's time, rounded up, + 2.
  buffers    TCP's largest buffers in the namespaces (tcp_rmem and tcp_wmem): raised to --buffers, or the kernel's own.
  mb/s       microbatches per second, of the slower stage in the second half of the run. In the first half TCP finds
             out what the link can take, which every connection does once.
  of zero    that / the same without delay and limit, at the default depth.
  start-up   seconds by which the first half took longer than with no link at all, once in a run: the first hidden
             states' way, and TCP's slow start.

The goal is 0.95 of zero at every delay, with the rate limited or not, in the rows with the rule's depth and raised
buffers.

What TCP's congestion control does is part of the link. Reno is the default here because every namespace has it. BBR
empties the link every ten seconds, for a round trip or 0.2 s, to measure it; the stages are idle meanwhile unless
the queue is deeper by that pause and TCP's recovery from it (try --congestion_control bbr with --extra_depth 0 and 16).
"""

import argparse
import json
import math
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

# Before PyTorch: one thread in each process.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Else it warns that addresses in the namespaces have no host names.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch

from benchmarks.helpers import machine
from benchmarks.helpers.simulated_stages import Load, run_ours, run_peer
from benchmarks.helpers.workers import Workers
from benchmarks.network.emulated_link import (
    ADDRESSES,
    DEVICE,
    EmulatedLink,
    enter_namespace,
    reason_not_possible,
    tcp_setting,
)
from lopt_pp.distributed.world import World

REACH = 0.95
HEAD = "one way   MB/s         depth   buffers    mb/s  of zero  start-up"
UNLIMITED = math.inf


@dataclass(frozen=True)
class Case:
    """One run: a link and who crosses it.

    Attributes:
        delay: seconds, one way.
        rate: bytes per second each way.
        method: `ours` or `1F1B`.
        queue_depth: of our stream.
        raised_buffers: whether TCP's buffers are raised.
    """

    delay: float
    rate: float
    method: str
    queue_depth: int = 0
    raised_buffers: bool = True


def rule(delay: float, load: Load) -> int:
    """The queue depth that hides a delay.

    A receive must be posted a round trip before its hidden states are needed, since gloo sends nothing before it has
    heard of the receive, and the transfer itself before that, which takes a microbatch's time at most or the link is
    too slow whatever the depth. That many and the one that the stage is working on.
    """
    return math.ceil(2 * delay / load.microbatch) + 2


def cases(delays: list[float], headroom: float, extra_depth: int, load: Load) -> list[Case]:
    """All runs, the one that the others are compared with first."""
    limited = headroom * load.bytes / load.microbatch
    runs = [Case(0, UNLIMITED, "ours", 2)]
    for delay in delays:
        depth = rule(delay, load) + extra_depth
        runs += [Case(delay, UNLIMITED, "ours", each) for each in (2, depth)]
        runs.append(Case(delay, UNLIMITED, "ours", depth, raised_buffers=False))
        runs.append(Case(delay, UNLIMITED, "1F1B"))
        runs.append(Case(delay, limited, "ours", depth))
        runs.append(Case(delay, limited, "1F1B"))
    return list(dict.fromkeys(runs))


def work(world: World, task: str, *arguments: Any) -> Any:
    tasks: dict[str, Callable[..., Any]] = {"run": run, "tcp": set_tcp, "probe": probe}
    return tasks[task](world, *arguments)


def set_tcp(world: World, settings: dict[str, str]) -> dict[str, str]:
    """Sets what TCP does in this namespace, for the connections that are made from now on.

    Returns:
        The settings that the benchmark is about, as they were.
    """
    before = {name: tcp_setting(name) for name in ("tcp_rmem", "tcp_wmem", "tcp_congestion_control")}
    for name, value in settings.items():
        tcp_setting(name, value)
    return before


def run(world: World, case: Case, load: Load, steps: int) -> Any:
    return (
        run_ours(world, 2, load, steps, case.queue_depth) if case.method == "ours" else run_peer(world, 2, load, steps)
    )


def probe(world: World, size: int) -> tuple[float, float] | None:
    """What the link itself can do: bytes per second, and the seconds of a round trip, on one TCP connection."""
    if world.rank == 1:
        with socket.create_server((ADDRESSES[1], 29501)) as server, server.accept()[0] as connection:
            left = size
            while left > 0:
                left -= len(connection.recv(1 << 20))
            for _ in range(6):
                connection.sendall(b".")
                connection.recv(1)
        return None
    connection = _connect((ADDRESSES[1], 29501))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        start = time.perf_counter()
        connection.sendall(bytes(size))
        connection.recv(1)
        sent = time.perf_counter()
        for _ in range(5):
            connection.sendall(b".")
            connection.recv(1)
        round_trip = (time.perf_counter() - sent) / 5
        connection.sendall(b".")
        return size / (sent - start), round_trip


def _connect(address: tuple[str, int]) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection(address)
        except ConnectionRefusedError:
            time.sleep(0.05)
    return socket.create_connection(address)


def number_of_steps(case: Case, load: Load, seconds: float) -> int:
    """How many steps the run takes so that it lasts about `seconds`, and long enough for TCP at this delay."""
    lasts = seconds + 24 * case.delay
    round_trip = 2 * case.delay
    if case.method == "1F1B":
        step = load.step + load.microbatches * round_trip
    else:
        step = load.microbatches * max(load.microbatch, round_trip / max(case.queue_depth - 1, 1))
    return 2 * max(math.ceil(lasts / step / 2), 2)


def measure(workers: Workers, link: EmulatedLink, case: Case, load: Load, seconds: float) -> dict[str, Any]:
    link.set(case.delay, case.rate)
    steps = number_of_steps(case, load, seconds)
    stages = workers.run("run", case, load, steps)
    half = steps // 2
    counted = (steps - half) * load.microbatches
    result = {**asdict(case), "steps": steps}
    if case.method == "1F1B":
        return result | {
            "microbatches_per_second": counted / max(s["ended"][-1] - s["ended"][half - 1] for s in stages)
        }
    begun = [stage["received"][half * load.microbatches] for stage in stages]
    slower = max(stage["ended"] - begin for stage, begin in zip(stages, begun, strict=True))
    startup = begun[1] - stages[0]["received"][0] - half * load.step - load.forward
    return result | {"microbatches_per_second": counted / slower, "startup_seconds": startup}


def prepare(rank: int, pipe: Connection) -> None:
    """Moves a worker into its namespace and hands its end of the link to the benchmark."""
    send_handle(pipe, enter_namespace(rank), os.getppid())


def print_row(result: dict[str, Any], buffers: int) -> None:
    rate = "-" if result["rate"] == UNLIMITED else f"{result['rate'] / 1e6:.1f}"
    depth = result["queue_depth"] or "-"
    size = f"{buffers} MiB" if result["raised_buffers"] else "kernel's"
    startup = f"{result['startup_seconds']:.2f}" if "startup_seconds" in result else "-"
    print(
        f"{result['delay'] * 1000:>7.0f} {rate:>6} {result['method']:>6} {depth:>6} {size:>9} "
        f"{result['microbatches_per_second']:>7.2f} {result['of_zero']:>8.3f} {startup:>9}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delays", type=float, nargs="+", default=[0, 25, 100, 250], metavar="MS", help="one way")
    parser.add_argument(
        "--headroom", type=float, default=1.1, help="of the limited rate over what is needed (default: %(default)s)"
    )
    parser.add_argument(
        "--shape", type=int, nargs=3, default=[1, 256, 576], help="of a message, in float32 (default: %(default)s)"
    )
    parser.add_argument(
        "--forward", type=float, default=0.02, help="a forward's sleep, in seconds (default: %(default)s)"
    )
    parser.add_argument("--microbatches", type=int, default=4, help="per step (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="of a run, and 12 round trips (default: %(default)s)")
    parser.add_argument("--buffers", type=int, default=64, help="raised TCP buffers, in MiB (default: %(default)s)")
    parser.add_argument("--extra_depth", type=int, default=0, help="added to the rule's depth (default: %(default)s)")
    parser.add_argument("--congestion_control", default="reno", help="TCP's (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="25 ms only, short runs")
    parser.add_argument("--output", type=Path, default=Path("link.json"), help="(default: %(default)s)")
    flags = parser.parse_args()
    if flags.quick:
        flags.delays, flags.seconds = [25], 0.5
    facts = machine.describe_machine(torch.device("cpu"))
    if (reason := reason_not_possible()) is not None:
        print(f"skipped: {reason}")
        flags.output.write_text(json.dumps({"machine": facts, "skipped": reason}, indent=2) + "\n")
        return

    load = Load(flags.forward, 2 * flags.forward, flags.forward / 2, flags.microbatches, tuple(flags.shape))
    results: list[dict[str, Any]] = []
    with Workers(2, (ADDRESSES[0], 29500), DEVICE, work, prepare) as workers:
        # The first thing that each worker sends is its end of the link.
        first, second = (recv_handle(pipe) for pipe in workers.pipes)
        with EmulatedLink((first, second)) as link:
            raised = {name: f"4096 131072 {flags.buffers << 20}" for name in ("tcp_rmem", "tcp_wmem")}
            kernel = workers.run("tcp", raised | {"tcp_congestion_control": flags.congestion_control})[0]
            own = {name: kernel[name] for name in raised}
            rate, round_trip = workers.run("probe", 100_000_000)[0]
            print(f"the link itself: {rate / 1e6:.0f} MB/s, and {round_trip * 1000:.2f} ms there and back at delay 0")
            print(HEAD, flush=True)
            for case in cases([delay / 1000 for delay in flags.delays], flags.headroom, flags.extra_depth, load):
                workers.run("tcp", raised if case.raised_buffers else own)
                result = measure(workers, link, case, load, flags.seconds)
                results.append(result)
                zero = results[0]["microbatches_per_second"]
                result["of_zero"] = result["microbatches_per_second"] / zero
                print_row(result, flags.buffers)
    goals = [r for r in results if r["method"] == "ours" and r["raised_buffers"]]
    goals = [r for r in goals if r["queue_depth"] >= rule(r["delay"], load)]
    missed = [r for r in goals if r["of_zero"] < REACH]
    at = ", ".join(f"{r['delay'] * 1000:.0f} ms" + (" limited" if r["rate"] < UNLIMITED else "") for r in missed)
    print(f"at least {REACH} of zero with the rule's depth: {'not at ' + at if missed else 'at every delay'}")
    print(
        f"{load.bytes / 1e6:.2f} MB per microbatch of {load.microbatch * 1000:.1f} ms; {flags.congestion_control}; "
        f"the kernel's own: {kernel}"
    )
    print(machine.one_line(facts))
    for result in results:
        result["rate"] = None if result["rate"] == UNLIMITED else result["rate"]
    summary = {
        "machine": facts,
        "link": {"bytes_per_second": rate, "round_trip_seconds": round_trip},
        "kernel": kernel,
        "congestion_control": flags.congestion_control,
        "buffers_mib": flags.buffers,
        "load": asdict(load),
        "reached": not missed,
        "runs": results,
    }
    flags.output.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
