"""What the job's script does with what becomes of the run; programs stand in for Slurm's and for torchrun."""

import json
import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import until

from lopt_pp.cluster.slurm import Job

SRUN = """\
#!/bin/bash
echo "$OMP_NUM_THREADS" >"$STANDINS/threads"
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""
"""Starts one node's part in place of all; its own flags are long ones with values."""

SCONTROL = """\
#!/bin/bash
if [[ "$1 $2" == "show node" ]]; then
    printf 'NodeName=%s\\n   NodeAddr=10.0.0.7 NodeHostName=%s Version=22.05.8\\n' "$3" "$3"
else
    echo "$*" >>"$STANDINS/requests"
fi
"""

TORCHRUN = """\
#!/bin/bash
printf '%s\\n' "$@" >"$STANDINS/flags"
echo "the run speaks"
"""

MODEL = "model.safetensors.index.json"


@dataclass(frozen=True)
class Node:
    """Where a script runs: a folder with the stand-ins, and one for the run's output.

    Attributes:
        folder: with both.
    """

    folder: Path

    @property
    def output_dir(self) -> Path:
        return self.folder / "a run's output"

    @property
    def requests(self) -> str:
        """What Slurm was asked to do."""
        path = self.folder / "requests"
        return path.read_text() if path.exists() else ""

    def start(self, run: str = "", **variables: str) -> "subprocess.Popen[str]":
        """Starts the script.

        Args:
            run: what torchrun does, in the shell; `$OUT` is the output directory.
            variables: of the environment, besides those that Slurm sets.
        """
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN + run}.items():
            (self.folder / name).write_text(text)
            (self.folder / name).chmod(0o755)
        job = Job(Path("/shared/run.yaml"), self.output_dir, "a-run", 2, 0, 2, 8, iface="ib0", max_restarts=3)
        outer = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        slurm = {"SLURM_JOB_ID": "1000007", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "8"}
        slurm |= {"SLURM_JOB_NODELIST": "n[1-2]", "SLURMD_NODENAME": "n1"}
        own = {"STANDINS": str(self.folder), "OUT": str(self.output_dir), "PATH": f"{self.folder}:{os.environ['PATH']}"}
        return subprocess.Popen(
            ["bash", "-c", job.script()],
            env=outer | slurm | own | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, run: str = "", **variables: str) -> tuple[int, str, str]:
        """The script's exit status, output and errors."""
        with self.start(run, **variables) as process:
            out, err = process.communicate(timeout=60)
        return process.returncode, out, err


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def stops(step: int, status: int = 0, number: str = "SIGUSR1") -> str:
    return f"""echo '{json.dumps({"step": step, "signal": number})}' >"$OUT/stopped.json"; exit {status}"""


def test_each_node_runs_torchrun_and_keeps_its_log(node: Node) -> None:
    status, out, err = node.run(f'touch "$OUT/{MODEL}"')
    assert (status, err, node.requests) == (0, "", "")
    logs = node.output_dir / "logs"
    assert out == (
        f"job 1000007, start 1: n[1-2], 2 processes on each, meeting at 10.0.0.7:20007; logs: {logs}/1000007-NODE.log\n"
    )
    assert (logs / "1000007-n1.log").read_text() == "the run speaks\n"
    assert (node.folder / "flags").read_text().splitlines() == [
        *["--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "3"],
        *["--rdzv-backend", "lopt-pp", "--rdzv-endpoint", "10.0.0.7:20007", "--rdzv-id", "1000007-0"],
        *["-m", "lopt_pp.train", "--config", "/shared/run.yaml", "--output_dir", str(node.output_dir)],
        *["--resume_from_checkpoint", "latest"],
    ]
    assert (node.folder / "threads").read_text() == "4\n", "two processes do not share eight cores"


def test_each_start_meets_under_a_name_of_its_own_and_goes_on_in_the_same_logs(node: Node) -> None:
    for restarts in ("0", "1"):
        assert node.run(f'touch "$OUT/{MODEL}"', SLURM_RESTART_COUNT=restarts)[0] == 0
    assert "1000007-1" in (node.folder / "flags").read_text().splitlines()
    assert (node.output_dir / "logs" / "1000007-n1.log").read_text() == "the run speaks\n" * 2


@pytest.mark.parametrize("status", [0, 1])
def test_a_stopped_run_goes_back_into_the_queue(node: Node, status: int) -> None:
    assert node.run(stops(5, status))[0] == 0
    assert node.requests == "requeue 1000007\n"
    assert node.run(stops(9))[0] == 0
    assert node.requests == "requeue 1000007\n" * 2


def test_a_run_that_gets_nowhere_does_not(node: Node) -> None:
    node.run(stops(5))
    status, _, err = node.run(stops(5))
    assert status == 1 and "lopt-pp: error: the run was stopped twice at the same step" in err
    assert node.requests == "requeue 1000007\n"
    # Preemption may come at any time, and is not the run's fault.
    assert node.run(stops(5, number="SIGTERM"))[0] == 0


@pytest.mark.parametrize("run", ["exit 3", "exit 0"])
def test_a_failed_run_does_not_even_if_it_was_stopped_before(node: Node, run: str) -> None:
    """It has not come so far as to remove the file, or it has left no model."""
    node.output_dir.mkdir()
    (node.output_dir / "stopped.json").write_text('{"step": 4, "signal": "SIGUSR1"}\n')
    status, _, err = node.run(run)
    said = f"lopt-pp: error: the run has failed (status {run[-1]}); the reason is in {node.output_dir}/logs/1000007-"
    assert status == 1 and said in err and node.requests == ""


def test_processes_hear_of_the_time_limit_and_torchrun_does_not(node: Node) -> None:
    status, _, err = node.run(f'kill -USR1 $$ && touch "$OUT/{MODEL}"')
    assert (status, err) == (0, "")


def test_a_node_that_is_told_to_end_does_not_end_the_others(node: Node) -> None:
    """torchrun has a status of its own then; srun would kill the other nodes for it."""
    wait = 'touch "$STANDINS/waits"; trap "exit 1" TERM; while :; do sleep 0.1; done'
    with node.start(f'echo $PPID >"$STANDINS/task"; {wait}') as process:
        until((node.folder / "waits").exists)
        task = int((node.folder / "task").read_text())
        os.kill(task, signal.SIGTERM)
        os.kill(int(subprocess.check_output(["pgrep", "-P", str(task), "-f", "torchrun"]).split()[0]), signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert "(status 0)" in err, "the node's part has another status"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"gpus_per_node": 2, "processes_per_node": None}, "the job has no GPUs; ask for some by --gpus-per-node"),
        ({"venv": Path("/nowhere")}, "VENV=/nowhere is not a virtual environment on "),
    ],
)
def test_what_is_missing_is_said(changes: dict[str, object], error: str) -> None:
    settings = {"config": Path("/r.yaml"), "output_dir": Path("/out"), "name": "a", "nodes": 1}
    job = Job(**({"gpus_per_node": 0, "processes_per_node": 1} | settings | changes))  # type: ignore[arg-type]
    result = subprocess.run(["bash", "-c", job.script()], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith(f"lopt-pp: error: {error}")


def test_modules_are_loaded_before_the_environment(tmp_path: Path, node: Node) -> None:
    activate = tmp_path / "venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text('echo "activated after $LOADED"\n')
    job = Job(Path("/r.yaml"), tmp_path / "out", "a", 1, 0, 1, venv=tmp_path / "venv", modules=("cuda/13.0", "gcc/14"))
    command = 'module() { LOADED="$*"; }; export -f module; exec bash -c "$1"'
    result = subprocess.run(["bash", "-c", command, "bash", job.script()], capture_output=True, text=True)
    assert result.stdout.startswith("activated after load cuda/13.0 gcc/14\n")
