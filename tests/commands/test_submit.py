"""A job's script of a run's flags: what is refused, and how it is handed over. No Slurm is needed."""

import json
import os
import re
from pathlib import Path

import pytest
from job_script import variables

from lopt_pp import cli


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    return write(tmp_path)


def write(folder: Path, **changes: object) -> Path:
    settings: dict[str, object] = {"model_name_or_path": "a-model", "train_file": str(folder / "rows.jsonl")}
    settings |= {"output_dir": str(folder / "out")} | changes
    path = folder / "run.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    return path


def submit(*arguments: object) -> int:
    return cli.main(["submit", *map(str, arguments)])


def test_flags_become_directives(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--nodes 2 --gpus-per-node 4 --cpus-per-task 16 --time 2-00 --partition gpu --account us --job-name a-run"
    more = "--signal-seconds 600 --iface ib0 --max-restarts 3 --modules cuda/13.0,gcc/14 --venv /shared/venv --dry-run"
    assert submit(run_yaml, *flags.split(), *more.split(), "--", "--exclusive", "--mem", "0") == 0
    script = capsys.readouterr().out
    directives = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        *["--job-name=a-run", "--partition=gpu", "--account=us", "--time=2-00", "--nodes=2", "--gpus-per-node=4"],
        *["--cpus-per-task=16", "--exclusive --mem 0", "--ntasks-per-node=1", "--output=%x-%j.log"],
        *["--signal=USR1@600", "--requeue", "--open-mode=append"],
    ]
    assert variables(
        script, "MODULES", "VENV", "CONFIG", "OUTPUT_DIR", "PROCESSES_PER_NODE", "IFACE", "MAX_RESTARTS"
    ) == [
        *["cuda/13.0|gcc/14", "/shared/venv", str(run_yaml), str(tmp_path / "out"), "", "ib0", "3"],
    ]
    assert not (tmp_path / "out").exists(), "a dry run has written something"


def test_defaults(run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(run_yaml, "--gpus-per-node", 2, "--dry-run") == 0
    script = capsys.readouterr().out
    for line in ("--job-name=run", "--nodes=1", "--gpus-per-node=2", "--signal=USR1@300"):
        assert f"#SBATCH {line}\n" in script
    assert not re.search("^#SBATCH --(partition|account|time|cpus-per-task)", script, re.MULTILINE)
    assert variables(script, "MODULES", "IFACE", "MAX_RESTARTS") == ["", "", "0"]


def test_processes_on_cpus_have_a_core_each(run_yaml: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(run_yaml, "--nodes", 2, "--gpus-per-node", 0, "--processes-per-node", 2, "--dry-run") == 0
    script = capsys.readouterr().out
    assert "#SBATCH --cpus-per-task=2\n" in script and "--gpus-per-node=" not in script.split("# ---")[0]
    assert variables(script, "PROCESSES_PER_NODE") == ["2"]


def test_the_virtual_environment_is_the_one_that_submits(
    run_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.prefix", "/a/venv")
    submit(run_yaml, "--gpus-per-node", 2, "--dry-run")
    assert variables(capsys.readouterr().out, "VENV") == ["/a/venv"]
    monkeypatch.setattr("sys.prefix", "/usr")
    monkeypatch.setattr("sys.base_prefix", "/usr")
    submit(run_yaml, "--gpus-per-node", 2, "--dry-run")
    assert variables(capsys.readouterr().out, "VENV") == [""]


@pytest.mark.parametrize(
    ("settings", "flags", "error"),
    [
        ({"lerning_rate": 1}, "", "run.yaml: unknown flag lerning_rate; did you mean --learning_rate?"),
        ({"queue_depth": 0}, "", "--queue_depth 0: at least 1"),
        ({"local_objective": "recon"}, "", "--local_objective recon: give reconstruction, next_token, none, or an"),
        ({"save_steps": 0}, "", "--save_steps 0: a job that comes back would begin anew"),
        (
            {"resume_from_checkpoint": "out/checkpoint-5"},
            "",
            "--resume_from_checkpoint out/checkpoint-5: a job goes on",
        ),
        ({"train_file": "/nothing.jsonl"}, "", "--train_file /nothing.jsonl does not exist"),
        ({"eval_file": "/nothing.jsonl"}, "", "--eval_file /nothing.jsonl does not exist"),
        ({"model_name_or_path": "/no/model"}, "", "--model_name_or_path /no/model: no such directory"),
        ({"model_name_or_path": "MODEL/.."}, "", " has no config.json; give the directory of a model"),
        ({"model_name_or_path": "MODEL/../t5"}, "", "/t5 is an encoder-decoder model (t5); give a causal"),
        (
            {"model_name_or_path": "MODEL", "num_stages": 5},
            "--gpus-per-node 5",
            "--num_stages 5 is more than the model's 4",
        ),
        (
            {"model_name_or_path": "MODEL", "split": "4"},
            "--gpus-per-node 2",
            "--split 4: layer numbers that ascend, from 1",
        ),
        ({"dataset_mapping": "nowhere:f"}, "", "--dataset_mapping nowhere:f: nowhere cannot be imported"),
        ({"chat_template_path": "no.jinja"}, "", "--chat_template_path no.jinja does not exist"),
        ({"num_stages": 3}, "--nodes 2 --gpus-per-node 2", "2 nodes with 2 processes each: 4 processes do not fit"),
        ({}, "--nodes 0", "--nodes 0: at least 1"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_submitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], flags: str, error: str
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "a" / "model" / "config.json").write_text('{"num_hidden_layers": 4}')
    (tmp_path / "a" / "model" / "model.safetensors").touch()
    (tmp_path / "a" / "t5").mkdir()
    (tmp_path / "a" / "t5" / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    if "model_name_or_path" in settings:
        name = str(settings["model_name_or_path"])
        settings = settings | {"model_name_or_path": name.replace("MODEL", str(tmp_path / "a" / "model"))}
    assert submit(write(tmp_path, **settings), *flags.split(), "--dry-run") == 2
    dry = capsys.readouterr()
    assert submit(write(tmp_path, **settings), *flags.split()) == 2
    shown = capsys.readouterr()
    assert shown == dry
    assert shown.err.startswith("lopt-pp: error: ") and error in shown.err and shown.err.count("\n") == 1
    assert shown.out == "" and not (tmp_path / "out").exists()


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for `sbatch` that keeps what it is given, and refuses what has the account `broke`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/bash\necho "$*" >{folder}/flags\ncat >{folder}/script\n'
        f'if grep -q "account=broke" {folder}/script; then\n'
        "    echo 'sbatch: error: Invalid account' >&2\n    exit 1\nfi\necho '17;a-cluster'\n"
    )
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_the_script_is_handed_over(
    run_yaml: Path, tmp_path: Path, queue: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert submit("run.yaml", "--nodes", 2, "--gpus-per-node", 1) == 0
    assert capsys.readouterr().out.splitlines() == [
        "job 17 is in the queue: 2 nodes with 1 process each",
        f"its log: {tmp_path}/run-17.log",
        f"the nodes' logs: {tmp_path}/out/logs/17-NODE.log",
    ]
    submit(run_yaml, "--nodes", 2, "--gpus-per-node", 1, "--dry-run")
    assert (queue / "script").read_text() == capsys.readouterr().out
    assert (queue / "flags").read_text() == "--parsable\n"


def test_what_slurm_says_against_a_job_is_told(run_yaml: Path, queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(run_yaml, "--gpus-per-node", 2, "--account", "broke") == 1
    assert capsys.readouterr().err == "lopt-pp: error: sbatch: error: Invalid account\n"


def test_a_finished_run_is_not_submitted(
    run_yaml: Path, tmp_path: Path, queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    for more in ([], ["--dry-run"]):
        assert submit(run_yaml, "--gpus-per-node", 2, *more) == 1
        assert "already holds a model; give another" in capsys.readouterr().err
    assert not (queue / "script").exists()


MANIFEST = {"step": 500, "run": {"seed": 42, "rows_per_step": 8, "packing": False}}


@pytest.mark.parametrize(
    ("settings", "manifest", "error"),
    [
        ({}, None, "out holds checkpoint-500, which has no manifest.json and so is of another program, or damaged"),
        ({"seed": 7}, MANIFEST, "checkpoint-500 is of another run: --seed is 7, and was 42; give it as before"),
        ({"per_device_train_batch_size": 4}, MANIFEST, "of another run: the rows of a step is 4, and was 8"),
        ({"packing": True}, MANIFEST, "of another run: --packing is True, and was False"),
        ({"max_steps": 499}, MANIFEST, "checkpoint-500 has done 500 steps, and the run has 499"),
        ({}, MANIFEST, None),
        ({"learning_rate": 1e-3, "max_steps": 900}, MANIFEST, None),
        ({"seed": 7}, {"damaged": True}, None),
    ],
)
def test_checkpoints_of_another_run_are_seen(
    tmp_path: Path,
    queue: Path,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, object],
    manifest: dict[str, object] | None,
    error: str | None,
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    if manifest is not None:
        (tmp_path / "out" / "checkpoint-500" / "manifest.json").write_text(json.dumps(manifest))
    for more in ([], ["--dry-run"]):
        assert submit(write(tmp_path, **settings), "--gpus-per-node", 2, *more) == (1 if error else 0)
        assert (error or "") in capsys.readouterr().err
    assert (queue / "script").exists() == (error is None)


@pytest.mark.parametrize(
    ("settings", "status"), [({"max_steps": 500}, 1), ({"max_steps": 900}, 0), ({}, 1), ({"num_train_epochs": 4}, 0)]
)
def test_a_finished_run_is_submitted_for_more_steps(
    tmp_path: Path, queue: Path, settings: dict[str, object], status: int
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    out = tmp_path / "out"
    (out / "checkpoint-500").mkdir(parents=True)
    (out / "checkpoint-500" / "manifest.json").write_text(json.dumps(MANIFEST))
    (out / "run.json").write_text(json.dumps({"flags": {"max_steps": -1, "num_train_epochs": 3.0}}))
    index = {"metadata": {"lopt_pp_run_id": "a" * 32, "lopt_pp_num_steps": 500}, "weight_map": {}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").touch()
    for more in ([], ["--dry-run"]):
        assert submit(write(tmp_path, **settings), "--gpus-per-node", 2, *more) == status


def test_a_dry_run_sees_what_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "a-file").touch()
    assert submit(write(tmp_path, output_dir=str(tmp_path / "a-file" / "out")), "--gpus-per-node", 2, "--dry-run") == 1
    assert capsys.readouterr().err.endswith(f"cannot be written: see {tmp_path}/a-file\n")


def test_without_slurm(
    run_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(run_yaml, "--gpus-per-node", 2) == 1
    assert capsys.readouterr().err.startswith("lopt-pp: error: there is no sbatch here")
