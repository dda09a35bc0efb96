"""What each process computes on, and whether that fits what the others compute on.

NVML counts the GPUs of a machine also where CUDA cannot use them (a driver that is too old for this PyTorch, a GPU that
it has no kernels for), so a GPU counts once something has run on it.
"""

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch.distributed import Store, is_nccl_available

from lopt_pp.errors import LoptError, first_line

NOT_BUILT = f"this PyTorch ({torch.__version__}) is a build without CUDA"
"""Why a PyTorch for CPUs uses no GPU."""


@dataclass(frozen=True)
class Placement:
    """What one process computes on.

    Attributes:
        device: as `torch.device` takes it.
        backend: of the hidden states: `nccl` or `gloo`.
        host: name of the machine.
        name: of the GPU; empty on a CPU.
        uuid: of the GPU; empty on a CPU.
        nccl_host: what NCCL takes for the machine: it refuses two processes with one GPU of one machine.
        reason: why it is not a GPU, where one was looked for: PyTorch's words.
        problem: why the process cannot take part; empty where it can.
        versions: of what must be the same in all processes, by name.
    """

    device: str
    backend: str
    host: str = field(default_factory=socket.gethostname)
    name: str = ""
    uuid: str = ""
    nccl_host: str = field(default_factory=lambda: os.environ.get("NCCL_HOSTID") or socket.gethostname())
    reason: str = ""
    problem: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def in_words(self) -> str:
        if self.name:
            return f"a GPU ({self.name}) over NCCL"
        return f"a CPU over gloo ({self.reason})" if self.reason else "a CPU over gloo"


def choose_device(backend: str, local_rank: int) -> Placement:
    """Decides what this process computes on, and makes a GPU the current one.

    It is the GPU with the number of the process on its machine; where the process sees fewer (one each, as
    `srun --gpus-per-task 1` has it), they are taken in turn, and `agree_on_devices` finds one that two have taken.

    Args:
        backend: `auto`, `nccl` or `gloo`, as the flag has it.
        local_rank: of the process on its machine.
    """
    versions = {"PyTorch": str(torch.__version__)}
    if backend == "gloo":
        return Placement("cpu", "gloo", versions=versions)
    try:
        device = _use_gpu(local_rank)
    except LoptError as error:
        if backend == "auto":
            return Placement("cpu", "gloo", reason=str(error), versions=versions)
        problem = (
            f"--backend nccl: this machine has no GPU that PyTorch can use: {error}; --backend gloo trains on CPUs"
        )
        return Placement("cpu", "gloo", problem=problem, versions=versions)
    properties = torch.cuda.get_device_properties(device)
    if is_nccl_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return Placement(str(device), "nccl", name=properties.name, uuid=str(properties.uuid), versions=versions)


def count_usable_gpus() -> int:
    """Number of GPUs that this process sees and PyTorch can use."""
    usable = 0
    for number in reversed(range(torch.cuda.device_count())):  # The first stays the current one.
        try:
            _use_gpu(number)
        except LoptError:
            continue
        usable += 1
    return usable


def check_gpu(device: torch.device) -> None:
    """Sees that PyTorch can use a GPU.

    Raises:
        LoptError: it cannot; the text says why.
    """
    try:
        _use_gpu(device.index or 0)
    except LoptError as error:
        raise LoptError(f"--device {device}: {error}; --device cpu runs on the CPU") from error
    if device.index is not None and device.index >= (count := torch.cuda.device_count()):
        raise LoptError(f"--device {device}: the last GPU that PyTorch sees is cuda:{count - 1}")


def _use_gpu(number: int) -> torch.device:
    """Makes a GPU the current one, by its number, or by what is left over where there are fewer.

    Raises:
        LoptError: PyTorch cannot use it; the text is the reason.
    """
    try:
        if (count := torch.cuda.device_count()) == 0:
            torch.cuda.init()  # Says why, mostly.
            raise LoptError("no GPU is visible")
        device = torch.device("cuda", number % count)
        torch.cuda.set_device(device)
        _compute_on(device)
    except AssertionError as error:
        raise LoptError(first_line(error) if torch.backends.cuda.is_built() else NOT_BUILT) from error
    except RuntimeError as error:
        raise LoptError(first_line(error)) from error
    return device


def _compute_on(device: torch.device) -> None:
    """Runs a kernel, and waits for it: the GPU may be taken, broken, or too old or too new for this PyTorch."""
    torch.ones(1, device=device).add_(1).item()


def agree_on_devices(store: Store, rank: int, size: int, own: Placement) -> str:
    """Compares what the processes compute on, before they make groups. All must call this.

    Args:
        store: of the run.
        rank: of this process.
        size: number of processes.
        own: of this process.

    Returns:
        What they compute on, for the log.

    Raises:
        LoptError: they do not fit together, in all processes alike.
    """
    store.set(f"device/{rank}", json.dumps(asdict(own)))
    if rank == 0:
        every = [Placement(**json.loads(store.get(f"device/{other}"))) for other in range(size)]
        store.set("devices", json.dumps({"fault": fault_of(every), "summary": summary_of(every)}))
    verdict = json.loads(store.get("devices"))
    if verdict["fault"]:
        raise LoptError(verdict["fault"])
    return str(verdict["summary"])


def fault_of(every: Sequence[Placement]) -> str:
    """Why processes cannot train together, by rank; empty where they can."""

    def who(rank: int) -> str:
        return f"rank {rank} ({every[rank].host})" if len(every) > 1 else ""

    first = every[0]
    for rank, other in enumerate(every):
        if other.problem:
            return f"{who(rank)}: {other.problem}" if len(every) > 1 else other.problem
    for rank, other in enumerate(every):
        if (other.backend, bool(other.name)) != (first.backend, bool(first.name)):
            return (
                f"{who(0)} computes on {first.in_words}, and {who(rank)} on {other.in_words}; all processes need "
                f"the same: mend that machine or leave it out, or train on CPUs by --backend gloo"
            )
    for rank, other in enumerate(every):
        for name, version in first.versions.items():
            if (there := other.versions.get(name)) != version:
                own = f"{who(0)} has {name} {version}"
                return f"{own}, and {who(rank)} has {there}; install the same version on all machines"
    return _shared_gpu(every)


def _shared_gpu(every: Sequence[Placement]) -> str:
    """Says which machine has fewer GPUs than processes; empty where each process has one of its own."""
    taken = Counter((placement.nccl_host, placement.uuid) for placement in every if placement.uuid)
    for placement in every:
        if taken[placement.nccl_host, placement.uuid] > 1:
            processes = sum(number for (host, _), number in taken.items() if host == placement.nccl_host)
            gpus = sum(1 for host, _ in taken if host == placement.nccl_host)
            return (
                f"{placement.host} has {processes} processes and {gpus} GPU{'s' if gpus > 1 else ''} for them "
                f"({placement.name}): start one process for each GPU, such as torchrun --nproc-per-node {gpus} (a "
                f"process may hold several stages), or train on CPUs by --backend gloo"
            )
    return ""


def summary_of(every: Sequence[Placement]) -> str:
    """What processes compute on, in one line."""
    first, size = every[0], len(every)
    hosts = len({placement.host for placement in every})
    place = f" on {hosts} machines" if hosts > 1 else ""
    processes = f"{size} process{'es' if size > 1 else ''}{place}"
    if not first.name:
        why = f": {first.reason}" if first.reason else ""
        return f"{processes}, on CPUs over gloo{why}" if size > 1 else f"{processes}, on the CPU{why}"
    names = Counter(placement.name for placement in every)
    gpus = ", ".join(f"{number} x {name}" if size > 1 else name for name, number in names.items())
    over = f" over NCCL {first.versions.get('NCCL', '')}" if size > 1 else ""
    return f"{processes}, on {gpus}{over}"
