"""Other launchers than `lopt-pp train`: what they start takes part in one run."""

import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from launching import run
from ranks import context, until
from results import weights

from lopt_pp import cli

FLAGS = "--max_steps 2 --backend gloo --save_steps 0"


def files(inputs: Path) -> str:
    return f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'}"


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    process = context.Process(target=_train, args=(f"{files(inputs)} {FLAGS} --output_dir {out}".split(), {}, None))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return out


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_accelerate_launch(inputs: Path, alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    flags = f"{launcher} --dynamo_backend no --main_process_port {free_port()} -m lopt_pp train {files(inputs)} {FLAGS}"
    done = run([sys.executable, *flags.split(), "--output_dir", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr
    assert "stage 0 (rank 0)] 2 processes, on CPUs over gloo" in done.stderr
    assert same(alone, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("0", "1"), ("1", "0")])
def test_tasks_of_srun(ranks: tuple[str, str], inputs: Path, alone: Path, tmp_path: Path) -> None:
    """Each is one process of the run, also where Slurm numbers them otherwise than node by node."""
    step = {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "here",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_NODEID": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "3",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    arguments = f"{files(inputs)} {FLAGS} --output_dir {tmp_path / 'out'}".split()
    tasks = [
        context.Process(
            target=_train, args=(arguments, step | {"SLURM_PROCID": rank, "SLURM_LOCALID": str(local)}, tmp_path)
        )
        for local, rank in enumerate(ranks)
    ]
    for task in tasks:
        task.start()
    until(lambda: not any(task.is_alive() for task in tasks), 120)
    said = [(tmp_path / f"task-{local}").read_text() for local in range(2)]
    assert [task.exitcode for task in tasks] == [0, 0], said
    assert "[stage 0 (rank 0)] 2 processes, on CPUs over gloo" in said[0] and "lopt-pp: " not in "".join(said)
    assert same(alone, tmp_path / "out")


def test_a_mistake_is_told_by_one_task_of_a_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = {"STEP_NUM_TASKS": "2", "STEP_NODELIST": "here", "STEP_TASKS_PER_NODE": "2", "NODEID": "0", "JOB_ID": "7"}
    for name, value in (step | {"STEP_ID": "3"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for local in ("0", "1"):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
            monkeypatch.setenv(name, "")  # So that it is as before in the end.
            monkeypatch.delenv(name)
        monkeypatch.setenv("SLURM_PROCID", local)
        monkeypatch.setenv("SLURM_LOCALID", local)
        assert cli.main(["train", "--max_stepps", "3"]) == 2
    assert capsys.readouterr().err.count("lopt-pp: error: ") == 1


def _train(arguments: list[str], environment: dict[str, str], logs: Path | None) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(environment)
    if logs is not None:
        with (logs / f"task-{environment['SLURM_LOCALID']}").open("wb", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(["train", *arguments]))
