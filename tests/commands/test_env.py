"""`lopt-pp env` says what a bug report needs, and nothing that is nobody's business."""

import socket
from pathlib import Path

import pytest

from lopt_pp import cli
from lopt_pp.commands import env


def test_only_links_that_are_up_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, state in {"eth0": "up", "eth1": "down", "lo": "unknown"}.items():
        (tmp_path / "net" / name).mkdir(parents=True)
        (tmp_path / "net" / name / "operstate").write_text(f"{state}\n")
    for number, state in {1: "4: ACTIVE", 2: "1: DOWN"}.items():
        port = tmp_path / "infiniband" / f"mlx5_{number}" / "ports" / "1"
        port.mkdir(parents=True)
        (port / "state").write_text(f"{state}\n")
    monkeypatch.setattr(env, "_CLASSES", tmp_path)
    assert [name for name, _ in env._interfaces()] == ["eth0", "lo", "mlx5_1"]


def test_what_a_report_has(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HOME", "/home/somebody/cache")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("OTHER", "private")
    assert cli.main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in lines if line.startswith("| ") and line != "| | |")
    assert rows.keys() >= {"system", "CPU", "memory", "python", "lopt-pp", "torch", "transformers", "datasets", "trl"}
    assert rows.keys() >= {"CUDA", "NCCL", "driver", "Slurm", "network lo"} and ("GPUs" in rows or "GPU 0" in rows)
    assert {"HF_TOKEN=(set)", "HF_HOME=~/cache", "NCCL_SOCKET_IFNAME=ib0", "TOKENIZERS_PARALLELISM=false"} <= set(lines)
    text = "\n".join(lines)
    assert all(word not in text for word in ("hf_secret", "somebody", "private", "OTHER", "127.0.0.1"))
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
