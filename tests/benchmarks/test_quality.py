"""The machinery of benchmarks/quality, on a random model of four layers; its figures mean nothing here."""

import importlib
import importlib.util
import json
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from results import weights

BENCHMARK = "benchmarks.quality"

Compare = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    """The benchmark's modules, by name; some take seconds to import."""
    names = ("comparison", "forms", "methods", "questions", "reasoning_tasks", "runs", "summary", "word_problems")
    return {name: importlib.import_module(f"{BENCHMARK}.{name}") for name in names}


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Compare:
    """Runs the benchmark with these flags: itself in this process, and what it starts in forks."""
    main = importlib.import_module(f"{BENCHMARK}.__main__").main
    runs = importlib.import_module(f"{BENCHMARK}.runs")
    monkeypatch.setattr(runs, "subprocess", SimpleNamespace(run=forked.run))

    def compare(*flags: str) -> subprocess.CompletedProcess[str]:
        try:
            status = main(flags)
        except SystemExit as end:
            assert isinstance(end.code, int)
            status = end.code
        return subprocess.CompletedProcess(flags, status, *capsys.readouterr())

    return compare


@pytest.mark.slow
def test_tiny_form_measures_and_goes_on_where_it_was(compare: Compare, tmp_path: Path) -> None:
    flags = ["--form", "tiny", "--folder", str(tmp_path)]
    flags += ["--methods", "next_token", "--method_flags", "next_token=--split 1 --auxiliary_layers 3"]
    result = compare(*flags)
    assert result.returncode == 0, result.stdout + result.stderr
    kept = json.loads((tmp_path / "quality.json").read_text())
    assert kept["machine"].keys() >= {"torch", "cpu", "cores", "date"}
    (speed,) = kept["speeds"].values()
    assert speed["step_seconds"] > 0 and len(speed["peak_memory_bytes"]) == 2
    # The auxiliary network's layers and norm, as the method's flags have them, come on top of the model.
    sizes = {name: tensor.numel() for name, tensor in weights(tmp_path / "random").items()}
    following = sum(size for name, size in sizes.items() if re.search(r"layers\.[123]\.|model\.norm", name))
    untied = 0 if "lm_head.weight" in sizes else sizes["model.embed_tokens.weight"]
    assert speed["trained_parameters"] == sum(sizes.values()) + untied + following
    untouched, line = kept["equal_steps"]
    assert (untouched["method"], line["method"]) == ("untouched", "next_token")
    for figures in (untouched["figures"], line["figures"]):
        assert figures.keys() >= {"test_loss", "accuracy", "general_perplexity", "general_kl", "instructions_kl"}
    assert untouched["figures"]["general_kl"]["mean"] == 0 < line["figures"]["general_kl"]["mean"]
    assert line["figures"]["drift_norm"]["mean"] > 0
    # One rate, and two for the earlier blocks; the chosen one is that with the lower validation loss.
    assert len(kept["trials"]) == 2
    best = min(kept["trials"], key=lambda trial: trial["validation_loss"])
    assert kept["best"] == {"next_token": ["next_token", 1e-2, best["trial"]["local_share"]]}
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")
    assert not any((tmp_path / "models").iterdir()), "models that are measured take no room"

    # Once more, with one trial not done and no time left: the others are read, and it is not begun.
    (tmp_path / "next_token-rate0.01-share0.1-seed1-steps3.json").unlink()
    again = compare(*flags, "--minutes", "1e-9")
    assert again.returncode == 0 and "goes on from here" in again.stderr
    (left,) = json.loads((tmp_path / "quality.json").read_text())["trials"]
    assert left in kept["trials"] and left["trial"]["local_share"] == 1

    # Results of something else are not taken for its own.
    other = compare(*flags, "--max_length", "1024")
    assert other.returncode == 1 and "other values of max_length; give another --folder" in other.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_benchmarks_have_columns(compare: Compare, tmp_path: Path) -> None:
    (tmp_path / "items.jsonl").write_text('{"question": "Is it so?", "answer": "yes"}\n' * 6)
    task = {
        "task": "assent",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "items.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "assent.yaml").write_text(json.dumps(task))  # JSON is YAML.
    folder = tmp_path / "quality"
    flags = ["--form", "tiny", "--folder", str(folder), "--methods", "frozen"]
    result = compare(*flags, "--tasks", "assent", "--include_path", str(tmp_path), "--limit", "4")
    assert result.returncode == 0, result.stdout + result.stderr
    lines = json.loads((folder / "quality.json").read_text())["equal_steps"]
    assert [line["method"] for line in lines] == ["untouched", "frozen"]
    for line in lines:
        assert line["figures"]["benchmark assent acc"]["mean"] in (0, 1), "all items are the same one"
    assert "| assent acc |" in result.stdout


def test_trials_side_by_side_have_a_device_each(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    methods, runs = modules["methods"], modules["runs"]
    both, busy, seen = threading.Barrier(2, timeout=30), set[int](), []

    def train(setup: object, trial: Any, device: int) -> dict[str, Any]:
        assert device not in busy
        busy.add(device)
        if trial.seed < 2:  # The first two are at work at the same time; the third comes when one is done.
            both.wait()
        busy.remove(device)
        return {"seed": trial.seed}

    monkeypatch.setattr(runs, "_train_and_measure", train)
    setup = runs.Setup(tmp_path, *[tmp_path] * 4, None, tmp_path, tmp_path, None, (), "cuda")
    trials = [methods.Trial("e2e", 1.0, None, seed, 1) for seed in range(3)]
    runs.train_and_measure(setup, trials, 2, lambda: None, lambda trial, result: seen.append(result["seed"]))
    assert sorted(seen) == [0, 1, 2] and not busy


def test_equal_wall_time_is_that_of_the_faster_1f1b(
    modules: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    comparison, methods = modules["comparison"], modules["methods"]
    seconds = {"e2e": 4.0, "e2e, own shapes": 3.0, "frozen": 1.5}
    monkeypatch.setattr(comparison, "measure_untouched", lambda setup: {})
    monkeypatch.setattr(comparison, "measure_speed", lambda setup, method, *others: {"step_seconds": seconds[method]})
    trained: list[Any] = []

    def train(setup: object, trials: list[Any], side_by_side: int, before: object, after: Any) -> None:
        trained.extend(trials)
        for trial in trials:
            after(trial, {"validation_loss": trial.learning_rate})

    monkeypatch.setattr(comparison, "train_and_measure", train)
    form = modules["forms"].FORMS["cpu"]
    for processes, expected in ((2, {"e2e": 50, "frozen": 100}), (1, {"e2e": 50, "frozen": 133})):
        setup = modules["runs"].Setup(tmp_path, *[tmp_path] * 4, None, tmp_path, tmp_path, form, (), "cpu")
        made = comparison.Comparison(setup, form, ["e2e", "frozen"], 2, processes, None)
        made.run()
        assert made.equal_time == expected
        assert set(made.speeds) == set(seconds) - ({"e2e, own shapes"} if processes == 1 else set())
        assert trained[-1] == methods.Trial("frozen", 5e-5, None, 3, expected["frozen"])


def test_no_question_is_in_two_splits(modules: dict[str, ModuleType]) -> None:
    tasks = modules["reasoning_tasks"]
    drawn = tasks.draw({"test": 60, "validation": 30, "train": 300})
    texts = [question.text for questions in drawn.values() for question in questions]
    assert len(texts) == len(set(texts)) == 390
    assert {question.task for question in drawn["test"]} == set(tasks.TASKS)
    accuracy = modules["questions"].accuracy
    right = accuracy(drawn["test"], [f" {question.entry['answer']}\n" for question in drawn["test"]])
    wrong = accuracy(drawn["test"], ["no idea"] * 60)
    assert all(sum(scores) == len(scores) == 10 for scores in right.values())
    assert not any(sum(scores) for scores in wrong.values())


def rewritten_and_tests(folder: Path) -> tuple[str, str]:
    """Directories as MetaMathQA, with each of 20 questions in three ways, and as GSM8K, which has one of them."""
    rewritten = [
        {
            "type": "GSM_Rephrased",
            "query": f"In words of way {way}, what is {number} and 2?",
            "original_question": f"What is {number} and 2?",
            "response": f"It is {number} + 2.\nThe answer is: {number + 2}",
        }
        for number in range(20)
        for way in range(3)
    ]
    tests = [
        {"question": f"What is {number} and 2?", "answer": f"<<{number}+2={number + 2}>>So.\n#### {number + 2}"}
        for number in range(19, 35)
    ]
    for file, rows in (("rewritten/train.jsonl", rewritten), ("tests/test.jsonl", tests)):
        (folder / file).parent.mkdir()
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rewritten"), str(folder / "tests")


def test_word_problems_of_one_origin_are_in_one_split(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    problems, questions = modules["word_problems"], modules["questions"]
    train, test = rewritten_and_tests(tmp_path)
    drawn = problems.load(train, test, {"test": 16, "validation": 5, "train": 40})
    numbers = {
        split: [re.search(r"is (\d+) and", question.text)[1] for question in drawn[split]]  # type: ignore[index]
        for split in drawn
    }
    assert len(set(numbers["test"])) == 16 and len(set(numbers["validation"])) == 5
    assert len(numbers["train"]) == 40 and len(set(numbers["train"])) == 14, "20 less 5, less the one that is tested"
    assert not set(numbers["train"]) & {*numbers["validation"], *numbers["test"]}
    assert drawn["test"][0].row["completion"][0]["content"].startswith("So."), "calculations are not said twice"
    assert drawn["test"][0].prompt == [{"role": "user", "content": drawn["test"][0].text}]
    again = questions.read(questions.as_json(drawn["test"]), [problems.WordProblem])
    assert again == drawn["test"]
    right = questions.accuracy(again, [f"The answer is: {question.entry['answer'][9:]}" for question in again])
    assert sum(right["word problems"]) == 16
    with pytest.raises(problems.UnknownRows, match="has 42 questions that can be used, and 43 are wanted"):
        problems.load(train, test, {"test": 16, "validation": 5, "train": 43})
    with pytest.raises(problems.UnknownRows, match="the split test of .* cannot be loaded"):
        problems.load(train, train, {"test": 1, "validation": 1, "train": 1})
    (tmp_path / "tests" / "test.jsonl").write_text('{"text": "What is it?"}\n')
    with pytest.raises(problems.UnknownRows, match="has the columns text; wanted are query and response"):
        problems.load(train, test, {"test": 1, "validation": 1, "train": 1})


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", 7),
        ("#### 1,234\nThe answer is: 1,234", 1234),
        ("The answer is: $-2.50 for 4 of them", -2.5),
        ("The answer is 3/4", 0.75),
        ("They are 12 in all, of whom 5 are old.", 5),
        ("The answer is: unknown. 8", 8),
        ("no idea", None),
        ("The answer is 3/0", None),
    ],
)
def test_the_number_that_an_answer_comes_to(modules: dict[str, ModuleType], answer: str, number: float | None) -> None:
    assert modules["word_problems"].result_of(answer) == number


@pytest.mark.slow
def test_word_problems_are_asked(compare: Compare, tmp_path: Path) -> None:
    train, test = rewritten_and_tests(tmp_path)
    flags = ["--form", "tiny", "--folder", str(tmp_path / "quality")]
    flags += ["--questions", "word_problems", "--dataset_name", train, "--eval_dataset_name", test]
    result = compare(*flags, "--minutes", "1e-9")
    assert result.returncode == 0, result.stdout + result.stderr
    untouched = json.loads((tmp_path / "quality" / "untouched.json").read_text())
    assert untouched["accuracy_of_tasks"].keys() == {"word problems"} and untouched["test_loss"]["value"] > 0
    missing = compare(*flags[:-1], str(tmp_path / "nowhere"))
    assert missing.returncode == 1 and "nowhere cannot be loaded" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_the_rates_of_the_lowest_validation_loss_are_taken_and_seeds_make_the_spread(
    modules: dict[str, ModuleType],
) -> None:
    methods, summary = modules["methods"], modules["summary"]
    results = {}
    for rate, seed, validation, loss in [(1, 1, 0.5, 9.0), (2, 1, 0.4, 2.0), (2, 2, 9.9, 4.0), (3, 1, float("nan"), 1)]:
        trial = methods.Trial("frozen", rate, None, seed, 10)
        results[trial] = {"validation_loss": validation, "test_loss": {"value": loss, "stderr": 0.1}}
    results[methods.Trial("frozen", 4, None, 1, 20)] = {"validation_loss": 0.1, "test_loss": {"value": 0, "stderr": 0}}
    grid = {trial: result for trial, result in results.items() if trial.seed == 1}
    best = summary.best_settings(grid, steps=10)
    assert best == {"frozen": ("frozen", 2, None)}
    (line,) = summary.lines_of(results, best, {"frozen": 10})
    assert line.seeds == 2 and line.figures["test_loss"].shown(3) == "3.000 ± 1.414"


def test_how_much_of_the_distance_a_method_closes(modules: dict[str, ModuleType]) -> None:
    summary = modules["summary"]
    lines = [
        summary.Line(method, None, 1, 1, {"test_loss": summary.Spread(loss, None)})
        for method, loss in (("frozen", 2.0), ("e2e", 1.0), ("next_token", 1.25))
    ]
    assert summary.closed(lines, "next_token") == 0.75
    assert summary.closed(lines[:1], "next_token") is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("", "needs --model"),
        (f"--form tiny --train_file {__file__}", "go together"),
        (
            f"--form tiny --questions reasoning_gym --train_file {__file__} --validation_file {__file__} "
            f"--eval_file {__file__}",
            "two answers",
        ),
        ("--form tiny --dataset_name rows", "go with --questions word_problems"),
        ("--form tiny --device cuda", "no GPU"),
        ("--form tiny --method_flags e3e=--split", "e3e=--split: METHOD=FLAGS, where METHOD is one of e2e, frozen"),
        ("--form tiny --general_file nowhere.jsonl", "nowhere.jsonl is not there"),
    ],
)
def test_what_is_missing_is_said(compare: Compare, flags: str, said: str) -> None:
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = compare(*flags.split())
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
