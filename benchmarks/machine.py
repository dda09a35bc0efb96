"""What a figure was measured on."""

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch


def describe() -> dict[str, str | int | float]:
    """The versions, the machine, the date, and the load average of the last minute, which says how quiet it was."""
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in cpus if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": cores,
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def one_line(facts: dict[str, str | int | float]) -> str:
    """The same, for under a table."""
    return (
        f"{facts['cores']} cores of {facts['cpu']}, load {facts['load']} before the run; torch {facts['torch']}; "
        f"{facts['date']}"
    )
