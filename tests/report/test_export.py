"""Reports and comparisons for programs and papers: the figures of the runs, and pictures."""

import csv
import html as entities
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import about, record, write_run

from lopt_pp import cli
from lopt_pp.report.comparison import compare
from lopt_pp.report.results import best_of, held_out, results, saved_step
from lopt_pp.report.run_data import read_run

LAYERS = [(0, 15), (15, 30)]


def made_run(folder: Path, losses: dict[int, float], name: str = "eval_loss", steps: int = 40, **flags: Any) -> Path:
    """A run in two stages, with held-out losses by step; its training loss is the same whatever these are."""
    records = []
    for step in range(0 if 0 in losses else 1, steps + 1):
        measured = {name: losses[step]} if step in losses else {}
        training = {"loss": 1.0 + 1.0 / step, "grad_norm": 1.0} if step > 0 else {}
        own = {"reconstruction_loss": 1.0 / step, "drift_norm": 0.01, "drift_cosine": 1.0} if step > 0 else {}
        records += [record(0, step, {"forward": 0.9}, **own), record(1, step, {"forward": 0.8}, **training, **measured)]
    return write_run(folder, records, about(LAYERS, [[0], [1]], **flags) | {"name": folder.name})


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """The first ends lower; the second was lower before."""
    first = made_run(tmp_path / "first", {0: 3.0, 20: 2.0, 40: 1.5}, learning_rate=1e-4)
    return first, made_run(tmp_path / "second", {0: 3.0, 20: 1.25, 40: 1.75}, learning_rate=2e-4)


def test_held_out_losses_come_first_in_a_comparison(runs: tuple[Path, Path]) -> None:
    html = compare([read_run(run) for run in runs])
    assert html.index("Held-out losses</h2>") < html.index("Losses</h2>", html.index("Held-out losses</h2>") + 20)
    for title in ("", " over time", " over tokens"):
        assert f'aria-label="Task loss, held out{title}"' in html and f'aria-label="Task loss{title}"' in html
    tiles = html[html.index('<div id="tiles"') : html.index("At a glance")]
    for shown in ("Best run", "<b>first</b>", "lowest held-out loss", "<b>1.5</b>", "from 3 at step 0", "of 40 steps"):
        assert shown in tiles
    for shown in ("Time in steps", "40 s", "Tokens", "4000", "100 tokens/s", "1024 MiB"):
        assert shown in tiles


def test_without_held_out_rows_the_training_loss_decides(tmp_path: Path) -> None:
    html = compare([read_run(made_run(tmp_path / name, {}, steps=steps)) for name, steps in (("a", 10), ("b", 30))])
    assert '<b>b</b><span class="soft">lowest training loss' in html and "held" not in html


def test_the_model_that_is_saved_is_the_one_that_counts(tmp_path: Path, runs: tuple[Path, Path]) -> None:
    flags: dict[str, Any] = {"load_best_model_at_end": True, "save_steps": 20}
    best = read_run(made_run(tmp_path / "best", {0: 3.0, 20: 1.25, 40: 1.75}, **flags))
    measured = held_out(best, "eval_loss")
    assert measured is not None and (measured.saved, measured.saved_step) == (1.25, 20)
    three = [results(read_run(run)) for run in runs] + [results(best)]
    assert best_of(three) == (2, "") and best_of(three[:2]) == (0, "")


def test_several_sets_of_held_out_rows(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "easy", {20: 2.0, 40: 1.0}, name="eval_easy_loss"))
    assert run.held_out == {"easy": "eval_easy_loss"} and set(results(run).held_out) == {"easy"}
    other = made_run(tmp_path / "both", {20: 2.0, 40: 1.5}, name="eval_easy_loss")
    lines = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval_easy_loss" in line:
            line |= {"eval_very_hard_loss": 4.0, "eval_very_hard_accuracy": 0.5, "eval_very_hard_perplexity": 54.6}
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    both = read_run(other)
    assert both.held_out == {"easy": "eval_easy_loss", "very_hard": "eval_very_hard_loss"}
    html = compare([run, both])
    assert "lowest held-out loss on easy" in html and 'aria-label="Task loss, held out, very_hard over time"' in html
    assert cli.main(["report", str(other)]) == 0
    report = (other / "report.html").read_text()
    assert 'aria-label="Accuracy"' in report and "held out, very_hard" in report and "erplexity" not in report


@pytest.mark.parametrize(
    ("flags", "step"),
    [
        ({}, None),
        ({"load_best_model_at_end": True}, 20),
        ({"load_best_model_at_end": True, "save_steps": 40}, 40),
        ({"load_best_model_at_end": True, "save_steps": 40, "save_strategy": "epoch"}, 30),
        ({"load_best_model_at_end": True, "metric_for_best_model": "accuracy"}, 30),
        ({"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy", "greater_is_better": False}, 10),
    ],
)
def test_which_model_is_saved(flags: dict[str, Any], step: int | None, tmp_path: Path) -> None:
    out = made_run(tmp_path, {0: 3.0, 10: 2.0, 20: 1.0, 30: 1.5, 40: math.nan}, **flags)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    accuracies = {0: 0.0, 10: 0.1, 20: 0.2, 30: 0.7, 40: 0.6}
    for line in lines:
        if line["stage"] == 1 and line["step"] in accuracies:
            line["eval_accuracy"] = accuracies[line["step"]]
            line["epoch"] = line["step"] / 15
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert saved_step(read_run(out)) == step


def test_values_that_no_chart_knows_have_one(tmp_path: Path) -> None:
    """As the trainers of preferences and rewards will name them; a curve for each part of a name, and each stage."""
    records = [
        record(
            stage, step, {"forward": 0.9}, entropy=1.0 + stage, **{f"rewards/{part}": value for part, value in parts}
        )
        | ({"eval_rewards/chosen": 0.9} if step == 4 and stage == 1 else {})
        for step in range(1, 5)
        for stage, parts in ((0, ()), (1, (("chosen", 0.1 * step), ("rejected", -0.1 * step))))
    ]
    assert cli.main(["report", str(write_run(tmp_path, records, about(LAYERS, [[0], [1]])))]) == 0
    html = (tmp_path / "report.html").read_text()
    charts = dict(_charts(html))
    assert [line["name"] for line in charts["Rewards"]["lines"]] == ["chosen", "rejected", "chosen, held out"]
    assert [line["name"] for line in charts["Entropy"]["lines"]] == ["stage 0", "stage 1"]
    assert charts["Rewards"]["lines"][1]["values"][-1] == "-0.4"


def _charts(html: str) -> Any:

    for name, data in re.findall(r'aria-label="([^"]*)" data-chart="([^"]*)"', html):
        yield entities.unescape(name), json.loads(entities.unescape(data))


def test_a_report_for_programs(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out, files = runs[1], [tmp_path / name for name in ("a.json", "a.csv", "a.svg")]
    assert (
        cli.main(
            [
                "report",
                str(out),
                *(f"--{flag}={file}" for flag, file in zip(("json", "csv", "png"), files, strict=True)),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        f"the report is {out / 'report.html'}",
        *(f"the {what} {file}" for what, file in zip(("results are", "values are", "picture is"), files, strict=True)),
    ]
    content = json.loads(files[0].read_text())
    assert (content["format"], content["name"], content["state"]) == (1, "second", None)
    assert content["results"]["held_out"]["eval_loss"] == {
        "first": 3.0,
        "first_step": 0,
        "lowest": 1.25,
        "lowest_step": 20,
        "saved": 1.75,
        "saved_step": 40,
    }
    assert content["results"]["steps"] == 40 and content["results"]["tokens"] == 4000
    assert [stage["layers"] for stage in content["stages"]] == [[0, 15], [15, 30]]
    assert content["flags"]["learning_rate"] == 2e-4
    assert any(one["kind"] == "warn" and "rose again" in one["text"] for one in content["advice"])
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), int(row["stage"])) for row in rows] == [(s, k) for s in range(41) for k in (0, 1)]
    assert float(rows[-1]["eval_loss"]) == 1.75 and rows[-2]["eval_loss"] == "" and rows[0]["loss"] == ""
    picture = files[2].read_text()
    for words in ("Task loss", "nats per token", "held out", "Reconstruction loss", "% of the norm", "step"):
        assert words in picture


def test_a_comparison_for_programs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    page, files = tmp_path / "both.html", [tmp_path / name for name in ("a.json", "a.csv", "a.png")]
    given = [f"--{flag}={file}" for flag, file in zip(("json", "csv", "png"), files, strict=True)]
    assert cli.main(["compare", *map(str, runs), f"--output={page}", *given]) == 0
    content = json.loads(files[0].read_text())
    assert content["best"] == {"name": "first", "by": "eval_loss"}
    assert content["differing_flags"] == {"learning_rate": {"first": 1e-4, "second": 2e-4}}
    assert [run["results"]["held_out"]["eval_loss"]["saved"] for run in content["runs"]] == [1.5, 1.75]
    with files[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["eval_loss_saved"], row["--learning_rate"], row["steps"]) for row in rows] == [
        ("first", "1.5", "0.0001", "40"),
        ("second", "1.75", "0.0002", "40"),
    ]
    assert files[2].read_bytes().startswith(b"\x89PNG")


def test_losses_that_are_not_numbers_are_sound_json(tmp_path: Path) -> None:
    out = made_run(tmp_path, {20: 1.0, 40: math.nan})
    assert cli.main(["report", str(out), f"--json={tmp_path / 'a.json'}"]) == 0
    content = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert content["results"]["held_out"]["eval_loss"]["saved"] is None


def test_a_picture_needs_matplotlib(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(runs[0]), f"--png={tmp_path / 'a.pdf'}"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"lopt-pp: error: --png {tmp_path / 'a.pdf'} needs matplotlib (")
    assert error.endswith("): pip install 'lopt-pp[insight]'\n") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["report", "compare"])
@pytest.mark.parametrize("flag", ["json", "csv", "png"])
def test_a_file_that_cannot_be_written_is_named(
    command: str, flag: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "gone" / "a.png"
    given = [str(runs[0])] if command == "report" else [*map(str, runs), f"--output={tmp_path / 'both.html'}"]
    assert cli.main([command, *given, f"--{flag}={file}"]) == 1
    assert capsys.readouterr().err == f"lopt-pp: error: --{flag} {file} cannot be written: No such file or directory\n"


def test_other_pictures_are_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["report", str(runs[0]), "--png", "a.gif"])
    assert "--png: a.gif ends in none of .png, .pdf, .svg" in capsys.readouterr().err
