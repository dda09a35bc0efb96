"""launch/quickstart.sh on machines with GPUs, as far as a stand-in for each program that it starts can show."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "quickstart.sh"


def program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("gpus", "backend"), [("0", "auto"), ("1", "gloo"), ("2", "auto"), ("", "auto")])
def test_one_gpu_for_two_processes_means_cpus(gpus: str, backend: str, tmp_path: Path) -> None:
    (tmp_path / ".quickstart" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    (tmp_path / ".quickstart" / "venv" / "bin").mkdir(parents=True)
    (tmp_path / ".quickstart" / "venv" / "bin" / "activate").touch()
    program(tmp_path / "launch" / "quickstart.sh", SCRIPT.read_text())
    program(tmp_path / "launch" / "venv.sh", "")
    program(tmp_path / "bin" / "python", '[[ "$1" == -c ]] && [[ "$2" == *count_usable_gpus* ]] && echo "$GPUS"; true')
    program(tmp_path / "bin" / "lopt-pp", f'echo "$@" >{tmp_path}/started')
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    command = ["bash", str(tmp_path / "launch" / "quickstart.sh")]
    subprocess.run(command, env={"PATH": path, "GPUS": gpus}, check=True, capture_output=True, timeout=60)
    assert f" --backend {backend} " in (tmp_path / "started").read_text()
