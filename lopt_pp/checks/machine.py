"""What the machine is: versions, driver, devices, and what lies between them."""

import os
import platform
import shutil
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

LIBRARIES = ("lopt-pp", "torch", "transformers", "datasets", "trl", "safetensors")


def versions() -> dict[str, str]:
    """Of Python and the libraries, of CUDA and NCCL as PyTorch was built with them, and of the driver."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = "not installed"
    found["CUDA"] = torch.version.cuda or "none: a build for CPUs"
    found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "not in use"
    found["driver"] = driver()
    return found


def driver() -> str:
    """The version of NVIDIA's driver."""
    said = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").split()
    return said[0] if said else "none"


def topology() -> str:
    """What `nvidia-smi topo -m` says of the links between GPUs; empty where there is none."""
    return _nvidia_smi("topo", "-m").rstrip()


def _nvidia_smi(*arguments: str) -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        result = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return ""
    return result.stdout if result.returncode == 0 else ""


def describe_devices() -> dict[str, Any]:
    """The GPUs that this process sees, whether they can be used, and what the CPU is.

    Returns:
        `host`, `local_rank`, `cpu`, `cores`, `gpus` (a list of `name`, `memory_bytes`, `uuid`, `compute_capability`,
        and `peers`: the numbers of the GPUs whose memory it reaches directly), and `unusable`: why GPUs cannot be
        used, or empty.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    described: dict[str, Any] = {"host": socket.gethostname(), "local_rank": local_rank}
    described |= {"cpu": _cpu(), "cores": _cores(), "gpus": []}
    try:
        number = torch.cuda.device_count()
        if number == 0:
            return described | {"unusable": "PyTorch sees no GPU"}
        torch.zeros(1, device=f"cuda:{local_rank % number}")
        for index in range(number):
            properties = torch.cuda.get_device_properties(index)
            described["gpus"].append(
                {
                    "name": properties.name,
                    "memory_bytes": properties.total_memory,
                    "uuid": str(properties.uuid),
                    "compute_capability": f"{properties.major}.{properties.minor}",
                    "peers": [o for o in range(number) if o != index and torch.cuda.can_device_access_peer(index, o)],
                }
            )
    except (RuntimeError, AssertionError) as error:  # What PyTorch raises where the driver does not do.
        return described | {"unusable": str(error).splitlines()[0]}
    return described | {"unusable": ""}


def _cpu() -> str:
    """The model of the CPU."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
