"""`lopt-pp env` says what a bug report needs, and nothing that is nobody's business."""

import socket

import pytest

from lopt_pp import cli


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
