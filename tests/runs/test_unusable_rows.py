"""A streamed run that comes to rows which cannot be used saves what it has done, and goes on once they are mended."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import ranks
from results import weights
from tiny import InputsWith

from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import STOPPED, complete_checkpoints

ROWS, BAD, STEPS = 600, (200, 201), 40
"""Rows of the file, those of one step that are malformed (not among the sample that is looked at first), and steps."""
LAYOUTS = {
    "one process": (1, "--num_stages 2 --gradient_accumulation_steps 2"),
    "two processes": (2, "--gradient_accumulation_steps 2 --save_steps 25"),
    "replicas": (4, "--data_parallel 2"),
    "end to end": (2, "--method e2e --gradient_accumulation_steps 2"),
}
"""Steps of 8 rows. With `--save_steps 25` the step before the rows has a checkpoint already."""


@pytest.fixture(scope="module")
def inputs(inputs_with: InputsWith) -> Path:
    return inputs_with(rows=ROWS)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run of good rows."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(inputs, inputs / "rows.jsonl", folder, "one process") == (0, "")
    return weights(folder / "out")


def break_rows(source: Path, target: Path) -> Path:
    lines = source.read_text().splitlines(keepends=True)
    first, second = BAD
    lines[first], lines[second] = '{"question": "what is 1 + 1?", "answ\n', '{"question": 1, "answer": 2}\n'
    target.write_text("".join(lines))
    return target


def run(inputs: Path, rows: Path, folder: Path, layout: str, more: str = "") -> tuple[int, str]:
    """The status that all processes left with, and the errors that they printed."""
    processes, flags = LAYOUTS[layout]
    given = f"--model_name_or_path {inputs / 'model'} --train_file {rows} --output_dir {folder / 'out'} --streaming"
    given += f" --max_steps {STEPS} --per_device_train_batch_size 4 --shuffle_dataset false {flags} {more}"
    arguments = [*given.split(), "--learning_rate", "1e-3"]
    with ranks(folder / f"logs{more}", *[arguments] * processes) as started:
        statuses = {rank.status(120) for rank in started}
    (status,) = statuses
    lines = [line for rank in started for line in rank.text.splitlines() if "lopt-pp: error: " in line]
    return status, "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_lost(layout: str, inputs: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path) -> None:
    rows, out, done = break_rows(inputs / "rows.jsonl", tmp_path / "rows.jsonl"), tmp_path / "out", 25
    status, said = run(inputs, rows, tmp_path, layout)
    assert status == 1 and said.count("\n") == 0, said
    assert f"row 201 of {rows}: " in said and f"nor can these be used: row 202 of {rows}" in said
    end = f". {done} of {STEPS} steps are done and saved: mend the rows, and --resume_from_checkpoint latest goes on"
    assert end in said
    assert not (out / STOPPED).exists() and not list(out.glob("*.safetensors"))
    (checkpoint,) = complete_checkpoints(out)
    manifest = read_manifest(checkpoint)
    assert (manifest.step, manifest.unusable_rows) == (done, list(BAD))
    if layout == "one process":  # Nothing is mended, or only one of the two: it ends there again, and is as it was.
        again = " --resume_from_checkpoint latest"
        assert run(inputs, rows, tmp_path, layout, again) == (1, said)
        lines = rows.read_text().splitlines(keepends=True)
        lines[BAD[0]] = (inputs / "rows.jsonl").read_text().splitlines(keepends=True)[BAD[0]]
        rows.write_text("".join(lines))
        status, said = run(inputs, rows, tmp_path, layout, again)
        assert status == 1 and said.startswith(f"lopt-pp: error: row 202 of {rows}: ") and "nor can" not in said
    shutil.copy(inputs / "rows.jsonl", rows)
    assert run(inputs, rows, tmp_path, layout, "--resume_from_checkpoint latest") == (0, "")
    if layout in ("one process", "two processes"):
        got = weights(out)
        assert got.keys() == undisturbed.keys()
        assert all(torch.equal(tensor, got[name]) for name, tensor in undisturbed.items())


def test_other_rows_are_not_gone_on_with(inputs: Path, tmp_path: Path) -> None:
    rows = break_rows(inputs / "rows.jsonl", tmp_path / "rows.jsonl")
    assert run(inputs, rows, tmp_path, "one process")[0] == 1
    lines = (inputs / "rows.jsonl").read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace("what is", "what  is")
    rows.write_text("".join(lines))
    status, said = run(inputs, rows, tmp_path, "one process", "--resume_from_checkpoint latest")
    assert status == 1 and "is of another run: the training rows (sha256) is" in said


def test_in_the_first_step_and_without_checkpoints(inputs: Path, tmp_path: Path) -> None:
    rows = break_rows(inputs / "rows.jsonl", tmp_path / "rows.jsonl")
    status, said = run(inputs, rows, tmp_path, "one process", "--save_steps 0")
    assert status == 1 and said.endswith(
        ". 25 of 40 steps are done; they are lost, since --save_steps 0 turns checkpoints off"
    )
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([*lines[:1], lines[BAD[0]], *lines[2:]]))
    status, said = run(inputs, rows, tmp_path, "one process", "--overwrite_output_dir")
    assert status == 1 and "row 2 of" in said and "steps are done" not in said
