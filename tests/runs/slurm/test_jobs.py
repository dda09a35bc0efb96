"""Jobs on a real Slurm: they train over two nodes, and stopping them, in whatever way, changes no weight."""

import contextlib
import io
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from launching import environment
from results import load_model, weights
from safetensors.torch import load_file
from slurm.cluster import NODES, Cluster, missing, until
from tiny import write_inputs

from lopt_pp import cli

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(900)]

STEPS, SAVE_STEPS = 150, 10
FINISHED = "model.safetensors.index.json"
WARNING = 120
"""Seconds before the time limit that Slurm gives its warning."""
PATIENCE = 300
"""Seconds; far more than a start takes on a busy machine, or Slurm to notice something."""


@dataclass(frozen=True)
class Submitted:
    """A job in the queue, and where its run writes."""

    cluster: Cluster
    number: str
    output_dir: Path

    def log(self, node: str = "") -> str:
        """The job's own log, or that of a node."""
        folder, name = (self.output_dir / "logs", f"-{node}.log") if node else (self.output_dir.parent, ".log")
        paths = list(folder.glob(f"*{self.number}{name}"))
        return paths[0].read_text() if paths else ""

    def logs(self) -> str:
        return "\n".join([self.log(), *map(self.log, NODES)])

    def until_state(self, *states: str) -> None:
        """Waits for the job's end, however it is to be."""

        def ended() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state in states or state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}:\n{self.logs()}"
            return state in states

        until(ended, PATIENCE, f"job {self.number} is {' or '.join(states)}")

    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def until_requeued(self) -> None:
        """Waits until what ran has ended, and the job is in the queue again, or beyond."""

        def is_requeued() -> bool:
            job = self.cluster.job(self.number)
            return job["Restarts"] == "1" and job["JobState"] != "COMPLETING"

        until(is_requeued, PATIENCE, "the job is requeued")

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "lopt_pp.train" in words and "--nnodes" not in words and str(self.output_dir) in words:
                found.append(process)
        return found

    def freeze(self) -> psutil.Process:
        """Holds the run once it has a checkpoint, so that whatever comes next comes in mid-run."""
        until((self.output_dir / "metrics.jsonl").exists, PATIENCE, "the first step")
        process = next(worker for worker in self.workers() if worker.environ()["RANK"] == "1")
        until((self.output_dir / f"checkpoint-{SAVE_STEPS}").is_dir, PATIENCE, "a checkpoint")
        process.suspend()
        assert not (self.output_dir / FINISHED).exists(), "the run is over"
        return process

    def stopped_at(self, number: signal.Signals) -> int:
        """The step that the run was stopped at by a signal, which it must have been once, with a checkpoint."""
        said = re.findall(rf"stopped by (\w+): (\d+) of {STEPS} steps are done", self.logs())
        assert [name for name, _ in said] == [number.name], self.logs()
        step = int(said[0][1])
        assert 0 < step < STEPS and (self.output_dir / f"checkpoint-{step}").is_dir()
        return step


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's own folder: the path of munge's socket has to be short, and all users must reach it.
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)
    try:
        with Cluster(root) as started:
            yield started
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and rows. Its name needs quoting in the shell, and in what Slurm reads."""
    folder = tmp_path_factory.mktemp("inputs") / "one's 100% runs"
    folder.mkdir()
    return write_inputs(folder)


def submit(cluster: Cluster, inputs: Path, name: str, *flags: str, **changes: object) -> Submitted:
    """Submits a run over both nodes, one process on each."""
    output_dir = inputs / name
    settings: dict[str, Any] = {"model_name_or_path": str(inputs / "model"), "train_file": str(inputs / "rows.jsonl")}
    settings |= {"output_dir": str(output_dir), "max_steps": STEPS, "save_steps": SAVE_STEPS, "learning_rate": 1e-3}
    settings |= {"per_device_train_batch_size": 2, "lr_scheduler_type": "cosine"}
    file = inputs / f"{name}.yaml"
    file.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in (settings | changes).items()))
    command = f"--nodes 2 --gpus-per-node 0 --processes-per-node 1 --time 20 --signal-seconds {WARNING}".split()
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        for variable, value in (environment() | cluster.environment).items():
            patch.setenv(variable, value)
        patch.chdir(inputs)
        assert cli.main(["submit", str(file), *command, *flags]) == 0
    number = re.search(r"^job (\d+) is in the queue: 2 nodes with 1 process each$", said.getvalue(), re.MULTILINE)
    assert number, said.getvalue()
    return Submitted(cluster, number[1], output_dir)


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, inputs: Path) -> Submitted:
    job = submit(cluster, inputs, "undisturbed")
    job.until_state("COMPLETED")
    return job


def assert_same_weights(job: Submitted, undisturbed: Submitted) -> None:
    found, expected = weights(job.output_dir), weights(undisturbed.output_dir)
    assert found.keys() == expected.keys() and expected
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


def test_a_job_over_two_nodes_leaves_a_model(inputs: Path, undisturbed: Submitted) -> None:
    load_model(undisturbed.output_dir)
    start = load_file(inputs / "model" / "model.safetensors")
    trained = weights(undisturbed.output_dir)
    moved = [name for name in trained if name in start and not torch.equal(start[name], trained[name])]
    assert any(".0." in name for name in moved) and any(".3." in name for name in moved)


def test_each_node_has_a_stage_and_a_log(undisturbed: Submitted) -> None:
    logs = [undisturbed.log(node) for node in NODES]
    spoke = [set(re.findall(r"^(?:[-\d]+ [:\d]+ )?\[(stage \d) \(rank \d\)\]", log, re.MULTILINE)) for log in logs]
    assert {"stage 0"} in spoke and all(len(stages) <= 1 for stages in spoke), logs
    assert re.search(
        r"job \d+, start 1: n\[1-2\], 1 processes on each, meeting at 127\.0\.0\.1:2\d{4};", undisturbed.log()
    )


def test_a_requeued_job_ends_with_the_same_weights(cluster: Cluster, inputs: Path, undisturbed: Submitted) -> None:
    job = submit(cluster, inputs, "requeued")
    job.freeze()
    cluster.run("scontrol", "requeue", job.number)  # It wakes what it ends.
    job.until_requeued()
    step = job.stopped_at(signal.SIGTERM)
    assert "Traceback" not in job.logs()
    job.until_state("COMPLETED")
    assert f"after step {step}" in job.logs()
    assert_same_weights(job, undisturbed)


def test_a_job_goes_on_after_its_time_limit_with_the_same_weights(
    cluster: Cluster, inputs: Path, undisturbed: Submitted
) -> None:
    job = submit(cluster, inputs, "limited")
    held = job.freeze()
    # Slurm warns two minutes before the limit. With at most two minutes left, that is when it next looks.
    hours, minutes, _ = cluster.job(job.number)["RunTime"].split(":")
    cluster.run("scontrol", "update", f"JobId={job.number}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    until(lambda: signal.SIGUSR1 in pending(held), PATIENCE, "Slurm's warning")
    with contextlib.suppress(psutil.NoSuchProcess):
        held.resume()
    job.until_requeued()
    cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=20")
    step = job.stopped_at(signal.SIGUSR1)
    assert "back into the queue" in job.log()
    job.until_state("COMPLETED")
    assert f"after step {step}" in job.logs()
    assert_same_weights(job, undisturbed)


def pending(process: psutil.Process) -> set[signal.Signals]:
    """The signals that wait for a held process; all, where it has gone: Slurm may wake what it warns."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return set(signal.Signals)
    mask = 0
    for field in re.findall(r"^(?:SigPnd|ShdPnd):\s+([0-9a-f]+)$", status, re.MULTILINE):
        mask |= int(field, 16)
    return {number for number in signal.Signals if mask >> (number - 1) & 1}


def test_a_bad_config_ends_the_job_with_the_reason_in_the_log(cluster: Cluster, inputs: Path) -> None:
    """One that no check at submission can know: it reads no rows."""
    job = submit(cluster, inputs, "bad", max_length=2)
    job.until_state("FAILED")
    assert "lopt-pp: error: none of the " in job.logs() and "longer than --max_length 2" in job.logs()
    assert f"the reason is in {job.output_dir}/logs/{job.number}-NODE.log" in job.log()
    assert job.restarts() == 0 and not list(job.output_dir.glob("*.safetensors*"))


def test_a_script_that_was_edited_after_the_check_fails_as_fast(cluster: Cluster, inputs: Path) -> None:
    job = submit(cluster, inputs, "edited", "--", "--hold")
    with (inputs / "edited.yaml").open("a") as file:
        file.write("lerning_rate: 1\n")
    cluster.run("scontrol", "release", job.number)
    job.until_state("FAILED")
    assert "edited.yaml: unknown flag lerning_rate; did you mean --learning_rate?" in job.logs()
    assert job.restarts() == 0


def test_a_cancelled_job_saves_and_does_not_come_back(cluster: Cluster, inputs: Path, tmp_path: Path) -> None:
    """Nor do the nodes end each other while they save. A stand-in for torchrun takes its time for it."""
    tools, output_dir = tmp_path / "venv" / "bin", inputs / "cancelled"
    tools.mkdir(parents=True)
    (tools / "activate").write_text(f"PATH={shlex.quote(str(tools))}:$PATH\n")
    save = f"""sleep "$SLURM_NODEID"; touch {shlex.quote(str(output_dir))}/saved$SLURM_NODEID; exit 1"""
    (tools / "torchrun").write_text(
        f"#!/bin/bash\ntrap {shlex.quote(save)} TERM\n"
        f"touch {shlex.quote(str(output_dir))}/started$SLURM_NODEID\nwhile :; do sleep 0.1; done\n"
    )
    (tools / "torchrun").chmod(0o755)
    job = submit(cluster, inputs, "cancelled", "--venv", str(tmp_path / "venv"))
    until(lambda: len(list(output_dir.glob("started?"))) == 2, PATIENCE, "both nodes")
    cluster.run("scancel", job.number)
    job.until_state("CANCELLED")
    assert len(list(output_dir.glob("saved?"))) == 2 and job.restarts() == 0, job.logs()


def srun(cluster: Cluster, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    """Runs a command of this program by one task on each node."""
    env = environment() | {name: cluster.environment[name] for name in ("SLURM_CONF", "PATH")}
    command = ["srun", "--nodes", "2", "--ntasks", "2", sys.executable, "-m", "lopt_pp.cli", *words]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=PATIENCE)


def test_each_task_is_one_process_of_a_run(cluster: Cluster, inputs: Path) -> None:
    """They meet at the first node's address, and start no further ones."""
    flags = "--model_name_or_path model --train_file rows.jsonl --output_dir by-srun --max_steps 2 --save_steps 0"
    refused = srun(cluster, inputs, "train", *flags.split(), "--nproc", "4")
    assert refused.returncode == 2 and "--nproc 4: the processes are started already, 2 of them" in refused.stderr
    done = srun(cluster, inputs, "train", *flags.split())
    assert done.returncode == 0 and done.stderr.count("2 processes, on CPUs over gloo") == 1, done.stderr
    load_model(inputs / "by-srun")


def test_check_tries_an_allocation(cluster: Cluster, inputs: Path) -> None:
    """One process for each task of `srun`: all check together, and the first speaks."""
    words = ["--only", "exactness: 2 stages", "is killed", "--json", "check.json"]
    result = srun(cluster, inputs, "check", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    said = json.loads((inputs / "check.json").read_text())
    assert [check["outcome"] for check in said["checks"]] == ["ok"] * 3
    assert result.stdout.count("ok    ") == 3, "more than one task speaks"
    assert not list(inputs.glob("lopt-pp-check-*")), "the runs are left over"
