"""`lopt-pp env`: what a bug report needs to say of a machine, as Markdown: versions, devices, links, settings.

It prints no host name, no address, no user's name and no secret. See `lopt-pp check` for whether runs work there.
"""

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lopt_pp.commands.common import CommandParser

_MORE_LIBRARIES = [
    "tokenizers",
    "huggingface_hub",
    "numpy",
    "pyarrow",
    "accelerate",
    "peft",
    "flash-attn",
    "bitsandbytes",
    "triton",
    "lm-eval",
]
"""Besides those that `lopt-pp check` names, where they are installed."""

_VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|KMP|HF|TRANSFORMERS|TOKENIZERS|HIP|ROCR|TRITON|LOPT)_\w+|LD_LIBRARY_PATH|"
    r"MASTER_PORT|(LOCAL_)?(RANK|WORLD_SIZE)|WANDB_MODE|"
    r"SLURM_(JOB_NUM_NODES|NTASKS|STEP_NUM_TASKS|STEP_TASKS_PER_NODE|GPUS_ON_NODE|CPUS_PER_TASK|DISTRIBUTION)"
)
"""Names of the variables that change how a run goes."""

_CLASSES = Path("/sys/class")
"""Where the kernel tells of devices."""

_SECRET = re.compile(r"TOKEN(?!IZERS)|KEY|SECRET|PASS|CREDENTIAL|AUTH", re.IGNORECASE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    CommandParser("lopt-pp env", description=__doc__).read(arguments)
    print("\n".join(report(os.environ)))
    return 0


def report(environment: Mapping[str, str]) -> Iterator[str]:
    """The lines of the report."""
    # Late, so that --help does not wait for torch.
    from lopt_pp.checks.machine import describe_devices, topology, versions

    here = describe_devices()
    yield from ("| | |", "|---|---|")
    rows = {"system": platform.platform(), "CPU": f"{here['cpu']}, {here['cores']} cores for this process"}
    rows |= {"memory": _memory()} | versions() | _further_versions() | {"Slurm": _slurm()}
    for name, value in rows.items():
        yield f"| {name} | {value} |"
    for number, gpu in enumerate(here["gpus"]):
        yield f"| GPU {number} | {_gpu(gpu)} |"
    if here["unusable"]:
        yield f"| GPUs | none that PyTorch can use: {here['unusable']} |"
    for name, value in _interfaces():
        yield f"| network {name} | {value} |"
    if links := topology():
        yield from ("", "```text", re.sub(r"\x1b\[\d*m", "", links), "```")
    if found := list(_variables(environment)):
        yield from ("", "```text", *found, "```")


def _further_versions() -> dict[str, str]:
    found = {}
    for library in _MORE_LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def _gpu(gpu: Mapping[str, Any]) -> str:
    peers = ", ".join(map(str, gpu["peers"]))
    reaches = f", reaches GPU {peers} directly" if peers else ""
    return (
        f"{gpu['name']}, {gpu['memory_bytes'] / 2**30:.0f} GiB, compute capability {gpu['compute_capability']}{reaches}"
    )


def _memory() -> str:
    try:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB"
    except (OSError, ValueError):
        return "unknown"


def _slurm() -> str:
    if shutil.which("srun") is None:
        return "none"
    said = subprocess.run(["srun", "--version"], capture_output=True, text=True, timeout=30).stdout.split()
    return said[-1] if said else "unknown"


def _interfaces() -> Iterator[tuple[str, str]]:
    """The network's interfaces that are not down: state, speed and packet size, no addresses."""
    for path in sorted((_CLASSES / "net").glob("*")):
        told = [_read(path / "operstate")]
        if told == ["down"]:
            continue
        if (speed := _read(path / "speed")).isdigit():
            told.append(f"{speed} Mbit/s")
        yield path.name, ", ".join([*filter(None, told), f"MTU {_read(path / 'mtu')}"])
    for port in sorted((_CLASSES / "infiniband").glob("*/ports/*")):
        if "DOWN" not in (state := _read(port / "state")):  # Such as `4: ACTIVE`.
            yield port.parents[1].name, f"InfiniBand or RoCE, {_read(port / 'rate')}, {state}"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:  # Of some interfaces the kernel knows no speed.
        return ""


def _variables(environment: Mapping[str, str]) -> Iterator[str]:
    home = environment.get("HOME", "")
    for name, value in sorted(environment.items()):
        if _VARIABLES.fullmatch(name):
            shown = value.replace(home, "~") if len(home) > 1 else value
            yield f"{name}={'(set)' if _SECRET.search(name) else shown}"
