"""Runs commands of Python as `subprocess.run` does, but in forks of a process that has imported the trainer already.

Nothing else is different from `python -m MODULE`, and a command does not take the seconds that PyTorch and
`transformers` need to start. For what a test shows with such a command, not for how a command starts.
"""

import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from launching import environment
from ranks import context, ranks

TORCHRUN = ["torch.distributed.run", "--rdzv-backend", "lopt-pp", "--nproc-per-node"]


def run(
    command: Sequence[str],
    timeout: float = 240,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    **_: Any,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end; its output is kept.

    Args:
        command: `python -m MODULE ...`, `python SCRIPT ...`, or torchrun with `-m MODULE ...`.
        timeout: seconds, after which it is killed.
        cwd: where it runs.
        env: all of its environment variables; without them, as `launching.run` sets them.
        _: what `subprocess.run` is told about the output.
    """
    interpreter, *words = command
    assert interpreter == sys.executable, command
    with tempfile.TemporaryDirectory() as folder:
        if words[1:5] == TORCHRUN:
            number, flag, module, *arguments = words[5:]
            assert flag == "-m", command
            return _ranks(command, int(number), module, arguments, Path(folder), timeout)
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        variables = dict(environment() if env is None else env)
        process = context.Process(target=_run, args=(words, variables, cwd or Path.cwd(), files))
        process.start()
        try:
            if not wait([process.sentinel], timeout):
                raise subprocess.TimeoutExpired(command, timeout)
            process.join()
        finally:
            process.kill()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, *(file.read_text() for file in files))


def _ranks(
    command: Sequence[str], number: int, module: str, arguments: Sequence[str], folder: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    with ranks(folder, *[arguments] * number, module=module) as started:
        statuses = [rank.status(timeout) for rank in started]
        text = "".join(rank.text for rank in started)
    return subprocess.CompletedProcess(command, max(map(abs, statuses)), "", text)


def _run(words: Sequence[str], variables: Mapping[str, str], cwd: Path, files: Sequence[Path]) -> None:
    for number, path in enumerate(files, start=1):
        with path.open("wb", buffering=0) as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*words]
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
