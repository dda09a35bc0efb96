"""All checks in their order, and what is told of each."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from lopt_pp.checks import lifecycle, speed
from lopt_pp.checks.exactness import layouts
from lopt_pp.checks.inputs import write_model, write_rows
from lopt_pp.checks.machine import topology, versions
from lopt_pp.checks.result import CheckFailed, Figures, NotHere, Result
from lopt_pp.checks.session import Ran, Session
from lopt_pp.checks.waits import waits
from lopt_pp.errors import LoptError

Check = Callable[[Session], Figures]


def checks_of(session: Session) -> dict[str, Check]:
    """The checks of a session by their names, in order."""
    checks: dict[str, Check] = {exactness.name: exactness for exactness in layouts(session.topology)}
    checks |= {
        "full determinism": lifecycle.same_bits,
        "checkpoint and resume": lifecycle.resume,
        "a process is killed, with a restart": lifecycle.restart,
        "a process is killed": lifecycle.kill,
        "a process hangs": lifecycle.hang,
        "a loss is not finite": lifecycle.not_finite,
        "SIGUSR1 stops the run": lifecycle.stop,
        "host waits": waits,
        "links": speed.links,
        "speed": speed.throughput,
    }
    return checks


def run_check(name: str, check: Check, session: Session) -> Result:
    """Makes one check."""
    begun = time.monotonic()
    try:
        return Result(name, "ok", figures=check(session), seconds=time.monotonic() - begun)
    except NotHere as error:
        return Result(name, "skip", time.monotonic() - begun, str(error))
    except (CheckFailed, LoptError) as error:
        return Result(name, "FAIL", time.monotonic() - begun, " ".join(str(error).split()))


def prepare(session: Session) -> None:
    """Makes what the runs read."""

    def write() -> None:
        inputs = session.folder / "inputs"
        stages = max(check.topology.num_stages for check in layouts(session.topology))
        write_model(inputs / "model", layers=max(4, stages), hidden=64)
        write_rows(inputs / "rows.jsonl", max(64, 8 * session.processes))

    session.leader_says(write)


def look_at_machine(session: Session, backend: Literal["auto", "nccl", "gloo"]) -> dict[str, Any]:
    """Finds out what the machine is, and which backend the runs take.

    Raises:
        CheckFailed: NCCL is asked for, and there is a process without a GPU; or a process has ended and said nothing.
    """
    looked = _look(session)
    if None in looked.results:
        looked.succeeded()
        raise CheckFailed("a process has ended before it said what it computes on (--keep DIR keeps its logs)")
    seen: list[dict[str, Any]] = looked.results
    unusable = [f"rank {rank}: {each['unusable']}" for rank, each in enumerate(seen) if each["unusable"]]
    if backend == "nccl" and unusable:
        raise CheckFailed(f"--backend nccl, and {unusable[0]}; give --backend gloo to check the CPUs")
    session.backend = "gloo" if unusable or backend == "gloo" else "nccl"
    machine: dict[str, Any] = {"versions": versions(), "backend": session.backend, "processes": seen}
    if session.backend == "nccl":
        by_host: dict[str, list[dict[str, Any]]] = {}
        for each in seen:
            by_host.setdefault(each["host"], []).append(each)
        session.shares_gpus = any(
            len({_gpu_of(each)["uuid"] for each in processes}) < len(processes) for processes in by_host.values()
        )
    machine["shares_gpus"] = session.shares_gpus
    machine["links"] = topology()
    machine["without GPUs because"] = unusable
    return machine


def _look(session: Session) -> Ran:
    """What each process sees; those that are forked first, which is how the other runs are started."""
    ran = session.run("look", [], entry="look")
    forked = [each["unusable"] if each else "ended" for each in ran.results]
    # All of them go the same way, also those of a node without a GPU.
    if not any(forked) or not any(session.all_say(torch.cuda.device_count() > 0)):
        return ran
    spawned = session.run("look-spawned", [], entry="look", spawn=True)
    if any(each is None or each["unusable"] for each in spawned.results):
        return spawned
    session.spawn_from_here_on()
    return spawned


def machine_lines(machine: dict[str, Any]) -> Sequence[str]:
    """What the machine is, for the terminal."""
    found: dict[str, str] = machine["versions"]
    lines = ["versions  " + ", ".join(f"{name} {version}" for name, version in found.items())]
    for rank, process in enumerate(machine["processes"]):
        lines.append(f"rank {rank}    {process['host']}: {_device(machine, process)}")
    if machine["shares_gpus"]:
        lines.append("note      processes share a GPU and talk over sockets: figures of speed are not those of a link")
    reasons = machine["without GPUs because"]
    if len(reasons) == len(machine["processes"]) and len({why.partition(": ")[2] for why in reasons}) == 1:
        reasons = [reasons[0].replace("rank 0", "all ranks")]
    lines += [f"note      no GPU is used; {why}" for why in reasons]
    if machine["links"]:
        lines += ["links between the GPUs (nvidia-smi topo -m):", machine["links"]]
    return lines


def _gpu_of(process: dict[str, Any]) -> dict[str, Any]:
    """The GPU that runs take, among those that the process sees."""
    gpus: list[dict[str, Any]] = process["gpus"]
    return gpus[process["local_rank"] % len(gpus)]


def _device(machine: dict[str, Any], process: dict[str, Any]) -> str:
    if machine["backend"] == "gloo":
        return f"{process['cpu']}, {process['cores']} cores, over gloo"
    gpus, gpu = process["gpus"], _gpu_of(process)
    memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
    reach = f"reaches {len(gpu['peers'])} others directly" if len(gpus) > 1 else "the only one that it sees"
    return f"{gpu['name']}, {memory}, {gpu['uuid']}, compute capability {gpu['compute_capability']}; {reach}"


def chosen(session: Session, words: Sequence[str]) -> dict[str, Check]:
    """The checks whose names have one of the words in them; all where none is given.

    Raises:
        CheckFailed: there is none.
    """
    checks = checks_of(session)
    picked = {name: check for name, check in checks.items() if not words or any(word in name for word in words)}
    if not picked:
        raise CheckFailed(f"--only {' '.join(words)}: no check has that in its name; there are: {', '.join(checks)}")
    return picked


def run_all(session: Session, words: Sequence[str], tell: Callable[[Result], None]) -> list[Result]:
    """Makes the checks that are chosen, and tells of each as soon as it is made."""
    checks = chosen(session, words)
    prepare(session)
    results = []
    for name, check in checks.items():
        results.append(run_check(name, check, session))
        tell(results[-1])
    return results
