"""`lopt-pp evaluate`: models on files and benchmarks, before and after, in one table."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import write_model, write_rows
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
from lopt_pp.data import DataConfig, TokenizedRows, load_rows

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
BENCHMARKS = {
    "sums": """\
        output_type: generate_until
        doc_to_target: "{{answer}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
    """,
    "choices": """\
        output_type: multiple_choice
        doc_to_choice: "{{[answer, 'zz', 'abc']}}"
        doc_to_target: 0
        metric_list: [{metric: acc}]
    """,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, two files of rows, two benchmarks."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_model(folder / "base", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 3
        model.model.layers[3].self_attn.v_proj.weight *= -2
    model.save_pretrained(folder / "tuned")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "tuned")
    write_rows(folder / "task.jsonl", number=12, seed=3)
    texts = [{"text": "abc" * length} for length in range(1, 9)]
    (folder / "general.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "tasks").mkdir()
    for name, content in BENCHMARKS.items():
        lines = [f"task: {name}", "dataset_path: json", "test_split: test", 'doc_to_text: "{{question}}"']
        lines.append(f"dataset_kwargs: {{data_files: {{test: {folder / 'task.jsonl'}}}}}")
        lines += [line.strip() for line in content.splitlines()]
        (folder / "tasks" / f"{name}.yaml").write_text("\n".join(lines))
    return folder


def evaluate(*arguments: object) -> int:
    return lopt_pp.cli.main(["evaluate", *map(str, arguments), "--device", "cpu"])


def numbers(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    """By kind, name and metric, what a JSON file says."""
    rows = json.loads(path.read_text())["measures"]
    return {(row["kind"], Path(row["name"]).name, row["metric"]): row for row in rows}


def row_losses(model_path: Path, rows_path: Path, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    """Summed losses and numbers of targets of the rows, by the whole model."""
    model = AutoModelForCausalLM.from_pretrained(model_path)
    rows = load_rows(DataConfig(train_file=[str(rows_path)], **how), AutoTokenizer.from_pretrained(model_path))
    assert isinstance(rows, TokenizedRows)
    sums, counts = [], []
    for row in (rows[number] for number in range(len(rows))):
        labels = torch.tensor(row.labels[1:])
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0, :-1]
        sums.append(F.cross_entropy(logits, labels, reduction="sum").item())
        counts.append(int((labels != -100).sum()))
    return np.array(sums), np.array(counts)


def test_files_before_and_after(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = files / "base", files / "tuned"
    given = ["--before", base, "--eval_file", files / "task.jsonl", "--general_eval_file", files / "general.jsonl"]
    assert evaluate(tuned, *given, "--output_path", tmp_path / "out.json") == 0
    said = capsys.readouterr()
    assert "Tokenizing" not in said.err, "there is no terminal to show a bar on"
    lines = said.out.splitlines()
    found = numbers(tmp_path / "out.json")
    assert list(found) == [
        (kind, f"{kind}.jsonl", metric) for kind in ("task", "general") for metric in ("loss", "perplexity")
    ]
    for kind in ("task", "general"):
        path = files / f"{kind}.jsonl"
        (before, counts), (after, _) = row_losses(base, path), row_losses(tuned, path)
        row = found[kind, path.name, "loss"]
        (new,) = row["models"]
        assert row["before"]["value"] == pytest.approx(before.sum() / counts.sum(), rel=1e-5)
        assert new["value"] == pytest.approx(after.sum() / counts.sum(), rel=1e-5)
        assert new["change"] == pytest.approx((after - before).sum() / counts.sum(), rel=1e-4)
        # A resampling of the rows tells how far the mean, and the change, would differ with other rows.
        draw = np.random.default_rng(0).integers(len(counts), size=(4000, len(counts)))
        for sums, stderr in ((after, new["stderr"]), (after - before, new["change_stderr"])):
            resampled = (sums[draw].sum(1) / counts[draw].sum(1)).std()
            assert stderr == pytest.approx(resampled, rel=0.2)
        perplexity = found[kind, path.name, "perplexity"]["models"][0]
        assert perplexity["value"] == pytest.approx(np.exp(new["value"]))
        (line,) = [line for line in lines if f"{path} | loss ↓" in re.sub(r" +", " ", line)]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == kind and cells[4] == f"{new['value']:.4f} ± {new['stderr']:.4f}"
        assert cells[5] == f"{new['change']:+.4f} ± {new['change_stderr']:.4f}"
    assert len({len(line) for line in lines}) == 1, "the columns are not aligned"
    assert f"before: {base}" in lines[0] and f"after: {tuned}" in lines[0]


def test_divergence_from_the_model_before(files: Path, tmp_path: Path) -> None:
    path = files / "general.jsonl"
    given = ["--before", files / "base", "--general_eval_file", path, "--output_path", tmp_path / "out.json"]
    assert evaluate(files / "tuned", *given, "--divergence") == 0
    row = numbers(tmp_path / "out.json")["general", path.name, "KL from before"]
    assert "before" not in row, "a model does not diverge from itself"

    models = [AutoModelForCausalLM.from_pretrained(files / name) for name in ("base", "tuned")]
    rows = load_rows(DataConfig(train_file=[str(path)]), AutoTokenizer.from_pretrained(files / "base"))
    assert isinstance(rows, TokenizedRows)
    sums, counts = [], []
    for row_of_data in (rows[number] for number in range(len(rows))):
        with torch.no_grad():
            old, new = (model(torch.tensor([row_of_data.input_ids])).logits[0, :-1].double() for model in models)
        wanted = torch.tensor(row_of_data.labels[1:]) != -100
        divergence = (old.softmax(-1) * (old.log_softmax(-1) - new.log_softmax(-1))).sum(-1)
        sums.append(divergence[wanted].sum().item())
        counts.append(int(wanted.sum()))
    (found,) = row["models"]
    assert found["value"] == pytest.approx(sum(sums) / sum(counts), rel=1e-4) and found["value"] > 1e-3


def test_divergence_needs_a_model_and_text(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(files / "tuned", "--eval_file", files / "task.jsonl", "--divergence")
    assert "give --before and --general_eval_file" in capsys.readouterr().err


def test_models_without_a_before(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--eval_file", files / "task.jsonl", "--limit", 4, "--max_length", 12, "--truncation_mode", "keep_end"]
    assert evaluate(files / "base", files / "tuned", *given) == 0
    head, _, loss, _ = capsys.readouterr().out.splitlines()
    assert [cell.strip() for cell in head.split("|")[4:6]] == [str(files / "base"), str(files / "tuned")]
    assert "change" not in head
    sums, counts = row_losses(files / "base", files / "task.jsonl", max_length=12, truncation_mode="keep_end")
    assert len(sums) == 12 and sums[:4].sum() != row_losses(files / "base", files / "task.jsonl")[0][:4].sum()
    assert loss.split("|")[4].strip().startswith(f"{sums[:4].sum() / counts[:4].sum():.4f} ± ")


@pytest.mark.skipif(not HAS_HARNESS, reason="needs lm-evaluation-harness: pip install 'lm-eval[hf]'")
def test_benchmarks(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = ["--tasks", "sums", "--general_tasks", "choices", "--include_path", files / "tasks", "--limit", 10]
    given += ["--before", files / "base", "--output_path", tmp_path / "out.json"]
    assert evaluate(files / "tuned", *given) == 0
    found = numbers(tmp_path / "out.json")
    assert list(found) == [("task", "sums", "exact_match"), ("general", "choices", "acc")]
    for row in found.values():
        (new,) = row["models"]
        assert row["higher_is_better"] is True and 0 <= new["value"] <= 1
        assert new["change"] == pytest.approx(new["value"] - row["before"]["value"])
        assert new["change_stderr"] is not None
    assert "| general | choices | acc ↑" in re.sub(r" +", " ", capsys.readouterr().out)
    assert evaluate(files / "tuned", "--tasks", "no-such-benchmark") == 1
    problem = capsys.readouterr().err.splitlines()[-1]
    assert problem.startswith(f"lopt-pp: error: lm_eval fails on {files / 'tuned'}: ")
    assert "no-such-benchmark" in problem


@pytest.mark.skipif(HAS_HARNESS, reason="lm-evaluation-harness is installed")
def test_without_the_harness_it_says_how_to_get_it(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(files / "tuned", "--tasks", "gsm8k") == 1
    error = "--tasks and --general_tasks need lm-evaluation-harness: pip install 'lm-eval[hf]>=0.4.13'"
    assert capsys.readouterr().err == f"lopt-pp: error: {error}\n"


def test_mistakes_are_one_line(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "no-rows.jsonl").touch()
    for arguments, error in [
        ((tmp_path, "--eval_file", files / "task.jsonl"), f"{tmp_path} has no model"),
        ((tmp_path / "no", "--eval_file", files / "task.jsonl"), f"{tmp_path / 'no'}: "),
        ((files / "base", "--eval_file", tmp_path / "no.jsonl"), f"--eval_file {tmp_path / 'no.jsonl'} does not exist"),
        (
            (files / "base", "--general_eval_file", tmp_path / "no-rows.jsonl"),
            f"--general_eval_file {tmp_path / 'no-rows.jsonl'} is empty",
        ),
        (
            (files / "base", "--eval_file", files / "task.jsonl", "--output_path", tmp_path),
            f"--output_path {tmp_path} cannot be written",
        ),
    ]:
        assert evaluate(*arguments) == 1
        problem = capsys.readouterr().err.splitlines()[-1]
        assert problem.startswith(f"lopt-pp: error: {error}"), problem


@pytest.mark.parametrize("flags", ["a-model", "", "a-model --eval_file a --limit 0", "a-model --eval_file a --dtype x"])
def test_unusable_flags(flags: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        lopt_pp.cli.main(["evaluate", *flags.split()])
    assert left.value.code == 2
    assert "lopt-pp evaluate: error: " in capsys.readouterr().err
