"""Prints the MiB that a process grows by while it loads a whole model, its first half, and its second.

load_memory.py LARGE SMALL        directories of two models; the small one is loaded first, for what is loaded once
"""

import os
import sys
from pathlib import Path

import torch
from blocks import load
from transformers import AutoModelForCausalLM


def memory(of: str) -> float:
    """A line of the kernel's status of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(of))


def main() -> None:
    large, small = map(Path, sys.argv[1:])
    load(small, 0)
    AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    for stage in (None, 0, 1):
        if (child := os.fork()) == 0:
            before = memory("VmRSS")
            whole = AutoModelForCausalLM.from_pretrained
            model = whole(large, dtype=torch.float32) if stage is None else load(large, stage)
            for parameter in model.parameters():
                parameter.detach().add_(0)  # Every weight is there, as it is in training.
            print(memory("VmHWM") - before, flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
