"""Trains one case after another in the same processes; for `ranks`, with a file of cases as the argument.

A case is {"name", "flags": [...], "slow_stage": null or a number, "seconds": of delay}. With "count_bytes" it writes
what the kernel's TCP counters say of the traffic between this process and the others to OUTPUT_DIR/bytes-RANK.json.
With "finish" the run is asked to evaluate and to save when all stages have reported that step, and then to finish;
with "heard_at" rank 0 waits after that step until a request to finish is heard.
"""

import dataclasses
import json
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from finishing import asking_to_finish, waiting_to_be_heard

import lopt_pp.training.run
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import connect
from lopt_pp.stage.stage import Stage

# Offsets of tcpi_bytes_acked and tcpi_bytes_received in the kernel's struct tcp_info.
_BYTES_ACKED, _BYTES_RECEIVED = 120, 128


def tcp_traffic() -> dict[str, int]:
    """The bytes that left (acknowledged) and arrived on this process's connections to other ranks, by the kernel.

    Those to the store, which is off the training path, are left out by their port.
    """
    total = {"sent": 0, "received": 0}
    for entry in os.listdir("/proc/self/fd"):
        try:
            connection = socket.socket(fileno=os.dup(int(entry)))
        except OSError:
            continue  # Not a socket, or closed since it was listed.
        with connection:
            if connection.family not in (socket.AF_INET, socket.AF_INET6) or connection.type != socket.SOCK_STREAM:
                continue
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
            ports = connection.getsockname()[1], connection.getpeername()[1] if info[0] == 1 else None
            if info[0] != 1 or int(os.environ["MASTER_PORT"]) in ports:
                continue  # Not established, or the store.
            total["sent"] += struct.unpack_from("Q", info, _BYTES_ACKED)[0]
            total["received"] += struct.unpack_from("Q", info, _BYTES_RECEIVED)[0]
    return total


def main(arguments: Sequence[str]) -> int:
    cases: list[dict[str, Any]] = json.loads(Path(arguments[0]).read_text())
    forward, train = Stage.forward, lopt_pp.training.run.train
    with connect(parse_config(cases[0]["flags"]).pipeline) as world:
        for number, case in enumerate(cases):

            def slow_forward(stage: Stage, *arguments: Any, case: dict[str, Any] = case) -> Any:
                if stage.index == case.get("slow_stage"):
                    time.sleep(case["seconds"])
                return forward(stage, *arguments)

            def counted_train(*arguments: Any, case: dict[str, Any] = case) -> None:
                before = tcp_traffic()
                train(*arguments)
                after = tcp_traffic()
                directory = Path(parse_config(case["flags"]).run.output_dir)
                traffic = {name: after[name] - before[name] for name in after}
                (directory / f"bytes-{world.rank}.json").write_text(json.dumps(traffic))

            own = dataclasses.replace(world, store=dist.PrefixStore(str(number), world.store))
            with ExitStack() as patched:
                patched.enter_context(mock.patch.object(Stage, "forward", slow_forward))
                if case.get("count_bytes"):
                    patched.enter_context(mock.patch.object(lopt_pp.training.run, "train", counted_train))
                if "finish" in case:
                    patched.enter_context(asking_to_finish(case["finish"]))
                if "heard_at" in case:
                    patched.enter_context(waiting_to_be_heard(case["heard_at"]))
                assert lopt_pp.training.run.run(parse_config(case["flags"]), own)
    return 0
