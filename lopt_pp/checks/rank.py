"""What the processes of a check's runs do: train, with an accident or without, or look at their device and their links.

Each function is named by a check and takes its arguments as text; the launcher has put the process's place into the
environment.
"""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lopt_pp.checks.session import RESULT


def train(arguments: list[str]) -> int:
    """A run of the trainer."""
    import lopt_pp.train

    _begin()
    return lopt_pp.train.main(arguments)


def train_until(arguments: list[str]) -> int:
    """A run in which something happens to one process.

    Args:
        arguments: rank, the step (from 1) that it is about to end, what happens (`kill`, `stop` or `hang`), then flags.
    """
    from lopt_pp.stage.stage import Stage

    rank, at, what = int(arguments[0]), int(arguments[1]), arguments[2]
    # After a restart it is not to happen again.
    if rank == int(os.environ["RANK"]) and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        end_step = Stage.step

        def with_accident(self: Stage, step: int) -> dict[str, float]:
            if step + 1 == at:
                _ACCIDENTS[what]()
            return end_step(self, step)

        Stage.step = with_accident  # type: ignore[method-assign]
    return train(arguments[3:])


def _hang() -> None:
    threading.Event().wait()


_ACCIDENTS: dict[str, Callable[[], None]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGUSR1),
    "hang": _hang,
}


def train_counting_waits(arguments: list[str]) -> int:
    """A run that notes where the host waits for the GPU, after its first two steps."""
    from lopt_pp.stage.stage import Stage
    from lopt_pp.util.host_waits import HostWaits

    places, run_microbatch, end_step = Counter[str](), Stage.run_microbatch, Stage.step
    is_warm, microbatches = False, 0

    def counted(self: Stage, *given: Any, **options: Any) -> Any:
        nonlocal microbatches
        if not is_warm:
            return run_microbatch(self, *given, **options)
        microbatches += 1
        with HostWaits(self.device) as waits:
            measured = run_microbatch(self, *given, **options)
        places.update(f"{wait.operator} in {wait.place}" for wait in waits.found)
        return measured

    def noted(self: Stage, step: int) -> dict[str, float]:
        nonlocal is_warm
        is_warm = step >= 1
        return end_step(self, step)

    Stage.run_microbatch, Stage.step = counted, noted  # type: ignore[method-assign]
    status = train(arguments)
    found({"microbatches": microbatches, "places": places})
    return status


def look(arguments: list[str]) -> int:
    """Finds this process's devices, and whether one of them can be used."""
    from lopt_pp.checks.machine import describe_devices

    _begin()
    found(describe_devices())
    return 0


def measure_links(arguments: list[str]) -> int:
    """Measures each boundary of this process, one after another.

    Args:
        arguments: number of stages, of replicas, and the backend.
    """
    from lopt_pp.checks.links import measure
    from lopt_pp.config.pipeline import PipelineConfig
    from lopt_pp.distributed.world import connect
    from lopt_pp.pipeline.boundary import boundaries

    _begin()
    stages, replicas = map(int, arguments[:2])
    backend: Any = arguments[2]
    config = PipelineConfig(num_stages=stages, data_parallel=replicas, backend=backend)
    measured = {}
    with connect(config) as world:
        ends = boundaries(world, config.topology(world.size), timeout=60.0)
        for stage in range(stages - 1):
            if stage in ends:
                measured[f"{stage}-{stage + 1}"] = asdict(measure(ends[stage], world.rank))
            world.barrier(f"measured {stage}")
    found(measured)
    return 0


def found(result: Any) -> None:
    """Leaves what this process has found, as JSON, for the check."""
    path = Path(os.environ["LOPT_PP_CHECK_FOLDER"]) / RESULT.format(os.environ["RANK"])
    path.write_text(json.dumps(result))


def _begin() -> None:
    """Lets processes share a GPU, and CPU cores."""
    torch.set_num_threads(1)
    if os.environ["LOPT_PP_CHECK_SHARES_GPUS"] == "1":
        # NCCL refuses two processes on one GPU of a host; as hosts of their own they talk over sockets.
        os.environ["NCCL_HOSTID"] = os.environ["RANK"]
        for name, value in {"NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1"}.items():
            os.environ.setdefault(name, value)
