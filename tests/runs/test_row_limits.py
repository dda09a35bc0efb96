"""Rows that the model cannot take end a run, or an evaluation, with one line that names them, before a step."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from results import weights
from tiny import write_model
from transformers import AutoTokenizer

import lopt_pp.cli
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import connect
from lopt_pp.errors import LoptError
from lopt_pp.training.run import run

SHORT, LONG, FOREIGN = "what is 1?", "what is 1" + " + 1" * 18 + "?", "what is ~?"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with 64 positions, whose tokenizer has a token and a padding token more than it has embeddings."""
    folder = tmp_path_factory.mktemp("limits")
    model = write_model(folder / "model", "gpt2", n_positions=64, vocab_size=45)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["~"])
    tokenizer.add_special_tokens({"pad_token": "<|new pad|>"})
    assert tokenizer.pad_token_id >= 45, "it has an embedding: nothing would be shown"
    tokenizer.save_pretrained(model)
    for name, questions in {"short": [SHORT] * 24, "long": [SHORT, LONG], "foreign": [SHORT, SHORT, FOREIGN]}.items():
        rows = [json.dumps({"question": question, "answer": str(n)}) for n, question in enumerate(questions)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return folder


def train(files: Path, out: Path, rows: str, *flags: str) -> None:
    given = f"--model_name_or_path {files / 'model'} --train_file {files / rows}.jsonl --output_dir {out} --max_steps 2"
    config = parse_config([*given.split(), "--max_length", "128", *flags])
    with connect(config.pipeline) as world:
        run(config, world)


@pytest.mark.parametrize(
    ("rows", "flags", "error"),
    [
        ("long", "", "row 2 of {}/long.jsonl: it has .* table of positions has 64; --max_length 64 leaves"),
        ("long", "--streaming true", "row 2 of {}/long.jsonl: it has"),
        ("long", "--packing true", "row 2 of {}/long.jsonl: it has"),
        ("foreign", "", "row 3 of {}/foreign.jsonl: the token id 45 is outside the model's, which go from 0 to 44"),
        ("short", "--eval_file {}/foreign.jsonl", "row 3 of {}/foreign.jsonl: the token id 45"),
        ("short", "--eval_file {}/long.jsonl", "row 2 of {}/long.jsonl: it has"),
    ],
)
def test_a_run_does_not_begin(files: Path, tmp_path: Path, rows: str, flags: str, error: str) -> None:
    with pytest.raises(LoptError, match="^" + error.format(files)) as refused:
        train(files, tmp_path / "out", rows, *flags.format(files).split())
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "flags", ["--packing true", "--packing true --split auto", "--max_length 64", "--padding_free true"]
)
def test_rows_that_fit_are_trained_on(
    files: Path, tmp_path: Path, flags: str, caplog: pytest.LogCaptureFixture
) -> None:
    """However long packs are, which the drift probe and `--split auto` see, too; and with a padding id out of range."""
    train(files, tmp_path / "out", "short", *flags.split(), "--probe_steps", "1")
    assert weights(tmp_path / "out")
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any("drift_norm" in record for record in records)
    assert sum("rows are padded with the id" in message for message in caplog.messages) <= 1
    config: dict[str, Any] = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("pad_token_id") is None, "no model can be made with a padding id beyond its embedding"


def test_an_evaluation_names_them(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rows, error in (("foreign", "row 3 of {}: the token id 45"), ("long", "row 2 of {}: it has")):
        path = files / f"{rows}.jsonl"
        assert lopt_pp.cli.main(["evaluate", str(files / "model"), "--eval_file", str(path), "--device", "cpu"]) == 1
        problem = capsys.readouterr().err.splitlines()[-1]
        assert problem.startswith(f"lopt-pp: error: {error.format(path)}")


def test_generation_ends_with_a_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(files / "model", tmp_path / "model")
    for prompt, error in ((FOREIGN, "--prompt has the token id 45"), (LONG, "the answer was broken off (")):
        given = ["generate", str(model), "--prompt", prompt, "--raw", "--device", "cpu", "--max_new_tokens", "2"]
        assert lopt_pp.cli.main(given) == 1
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"lopt-pp: error: {error}")
