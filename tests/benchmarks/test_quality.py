"""The machinery of benchmarks/quality, on a random model of four layers; its figures mean nothing here."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from launching import TESTS, run

BENCHMARK = TESTS.parent / "benchmarks" / "quality"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType, ModuleType]]:
    """`methods`, `summary` and `tasks` of the benchmark."""
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import methods
    import summary
    import tasks

    yield methods, summary, tasks
    for name in ("methods", "summary", "tasks"):
        sys.modules.pop(name)


def test_tiny_form_measures_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARK), "--form", "tiny", "--folder", str(tmp_path)]
    command += ["--methods", "next_token"]
    result = run(command)
    assert result.returncode == 0, result.stdout + result.stderr
    kept = json.loads((tmp_path / "quality.json").read_text())
    assert kept["machine"].keys() >= {"torch", "cpu", "cores", "date"}
    (speed,) = kept["speeds"].values()
    assert speed["step_seconds"] > 0 and len(speed["peak_memory_bytes"]) == 2
    # The blocks have 45,760 parameters; the auxiliary network's two layers and norm come on top.
    assert speed["trained_parameters"] > 50_000
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
    again = run([*command, "--minutes", "1e-9"])
    assert again.returncode == 0 and "goes on from here" in again.stderr
    (left,) = json.loads((tmp_path / "quality.json").read_text())["trials"]
    assert left in kept["trials"] and left["trial"]["local_share"] == 1


def test_no_question_is_in_two_splits(modules: tuple[ModuleType, ...]) -> None:
    *_, tasks = modules
    drawn = tasks.draw({"test": 60, "validation": 30, "train": 300})
    texts = [question.text for questions in drawn.values() for question in questions]
    assert len(texts) == len(set(texts)) == 390
    assert {question.task for question in drawn["test"]} == set(tasks.TASKS)
    right = tasks.accuracy(drawn["test"], [f" {question.entry['answer']}\n" for question in drawn["test"]])
    wrong = tasks.accuracy(drawn["test"], ["no idea"] * 60)
    assert all(sum(scores) == len(scores) == 10 for scores in right.values())
    assert not any(sum(scores) for scores in wrong.values())


def test_the_rates_of_the_lowest_validation_loss_are_taken_and_seeds_make_the_spread(
    modules: tuple[ModuleType, ...],
) -> None:
    methods, summary, _ = modules
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


def test_how_much_of_the_distance_a_method_closes(modules: tuple[ModuleType, ...]) -> None:
    _, summary, _ = modules
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
        ("--form tiny --train_file a.jsonl", "go together"),
        ("--form tiny --device cuda", "no GPU"),
    ],
)
def test_what_is_missing_is_said(flags: str, said: str) -> None:
    if "cuda" in flags:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    result = run([sys.executable, str(BENCHMARK), *flags.split()])
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
