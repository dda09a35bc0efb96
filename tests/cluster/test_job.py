"""The job's script of values: what the shell reads in it, and what is refused. No Slurm is needed."""

import shutil
import subprocess
from pathlib import Path

import pytest
from job_script import variables

from lopt_pp.cluster.slurm import Job
from lopt_pp.errors import LoptError

EXAMPLES = Path(__file__).parents[2] / "launch" / "slurm"

SHARED = Path("/shared/runs")

ONE_NODE = Job(
    config=SHARED / "run.yaml",
    output_dir=SHARED / "out",
    name="lopt-pp",
    nodes=1,
    gpus_per_node=4,
    cpus_per_task=32,
    time="12:00:00",
    partition="gpu",
    account="my-account",
    venv=SHARED / "venv",
)
"""What launch/slurm/one_node.sbatch is filled in with."""

MANY_NODES = Job(**{**vars(ONE_NODE), "nodes": 4})
"""What launch/slurm/many_nodes.sbatch is filled in with."""


def job(**changes: object) -> Job:
    return Job(**{**vars(ONE_NODE), **changes})


@pytest.mark.parametrize(("name", "given"), [("one_node", ONE_NODE), ("many_nodes", MANY_NODES)])
def test_the_examples_are_what_submit_writes(name: str, given: Job) -> None:
    assert (EXAMPLES / f"{name}.sbatch").read_text() == given.script()


@pytest.mark.parametrize("text", ["a b", "it's", '"', "$HOME `id` $(id)", "100%", "# no", "a;b&c", "é*?", "@nodes@"])
def test_whatever_is_in_a_path_stays_as_it_is(text: str) -> None:
    config, output_dir = SHARED / text / "run.yaml", SHARED / text
    given = job(config=config, output_dir=output_dir, venv=output_dir, iface=text, modules=(text, "b"), name=text)
    script = given.script()
    expected = [str(config), str(output_dir), str(output_dir), text, f"{text}|b"]
    assert variables(script, "CONFIG", "OUTPUT_DIR", "VENV", "IFACE", "MODULES") == expected


@pytest.mark.parametrize(
    "given", [ONE_NODE, job(name="it's", modules=("a b",), venv=None, gpus_per_node=0, processes_per_node=1)]
)
def test_the_script_is_sound(given: Job, tmp_path: Path) -> None:
    file = tmp_path / "job.sbatch"
    file.write_text(given.script())
    subprocess.run(["bash", "-n", str(file)], check=True)
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", "--shell=bash", str(file)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"nodes": 0}, "^--nodes 0: at least 1$"),
        ({"gpus_per_node": -1}, "^--gpus-per-node -1: at least 0$"),
        ({"gpus_per_node": 0}, "^--gpus-per-node 0: give --processes-per-node"),
        ({"gpus_per_node": 0, "processes_per_node": 0}, "^--processes-per-node 0: at least 1$"),
        ({"processes_per_node": 2}, "^--processes-per-node is for CPUs"),
        ({"cpus_per_task": 0}, "^--cpus-per-task 0: at least 1$"),
        ({"max_restarts": -1}, "^--max-restarts -1: at least 0$"),
        ({"signal_seconds": 0}, "^--signal-seconds 0: at least 1$"),
        ({"signal_seconds": 70_000}, "^--signal-seconds 70000: at most 65535$"),
        ({"time": "soon"}, "^--time soon: minutes, or hours:minutes:seconds"),
        (
            {"time": "6"},
            "^--time 6 is too short for --signal-seconds 300: Slurm may give its warning another 60 seconds",
        ),
        ({"time": "6:00"}, "^--time 6:00 is too short"),
        ({"time": "0:06:00"}, "^--time 0:06:00 is too short"),
        ({"time": "0-0:6"}, "^--time 0-0:6 is too short"),
        ({"name": ""}, "^--job-name '': may not be empty"),
        ({"name": "a/b"}, "^--job-name a/b: may not hold a slash"),
        ({"partition": "a\nb"}, r"^--partition 'a\\nb': may not be empty, nor hold a backslash or a line break$"),
        ({"output_dir": SHARED / "a\\b"}, r"^--output-dir '.*a\\\\b': may not"),
        ({"sbatch_flags": ("--comment=a\\b",)}, r"^after -- '--comment=a\\\\b': may not"),
    ],
)
def test_unusable_values(changes: dict[str, object], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        job(**changes)


@pytest.mark.parametrize("time", ["7", "6:01", "0:06:01", "0-1", "0-0:7", "1-0:0:0"])
def test_times_as_slurm_writes_them(time: str) -> None:
    assert f"#SBATCH --time={time}\n" in job(time=time).script()
