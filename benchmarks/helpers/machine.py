"""What a benchmark's figures depend on besides the code: kept in its result."""

import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """The versions, the processor (and GPU), the cores that this process may use, and the date."""
    description: dict[str, str | int] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "threads_per_process": torch.get_num_threads(),
        "load_average": f"{os.getloadavg()[0]:.2f}",
    }
    if device.type == "cuda":
        description |= {"gpu": torch.cuda.get_device_name(device), "gpus": torch.cuda.device_count()}
    return description


def cpu_model() -> str:
    """As the kernel names it."""
    info = Path("/proc/cpuinfo")
    if sys.platform == "linux" and info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def one_line(description: dict[str, str | int]) -> str:
    """The same, for under a table."""
    return (
        f"{description['cores']} cores of {description['cpu']}, load {description['load_average']} before the run; "
        f"torch {description['torch']}; {description['date']}"
    )
