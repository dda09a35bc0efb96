"""What of a run's figures is harm."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import about, record, write_run

from lopt_pp import cli
from lopt_pp.config.objective import LOCAL_RATES, LocalRates, ObjectiveConfig
from lopt_pp.objectives import AuxiliaryNextToken, NextToken, Objective, Reconstruction, local_objective_class
from lopt_pp.report.harm import harm, keeps_growing, quarters
from lopt_pp.report.run_data import read_run

STEPS = 40
RECONSTRUCTION = {"method": "lopt", "local_objective": "reconstruction", "local_learning_rate": None}
NEXT_TOKEN = {"method": "lopt", "local_objective": "next_token", "local_learning_rate": None}
HALF = {"gradient_accumulation_steps": 4, "local_accumulation_steps": 2}
CURE = (
    "What helps, in this order: a lower --local_learning_rate (it is 1e-05), --local_objective next_token with "
    "--auxiliary_choice all, or --method frozen, which leaves the earlier stages as they are (see docs/quality.md)."
)


def made_run(
    folder: Path,
    evaluations: Mapping[int, float] | None = None,
    drifts: Sequence[float] = (),
    planned: int = STEPS,
    **flags: Any,
) -> Path:
    """A run of 40 steps in two stages: held-out task losses by step, and drifts at even distances."""
    evaluations = evaluations or {}
    every = STEPS // len(drifts) if drifts else STEPS + 1
    records = []
    for step in range(0 if 0 in evaluations else 1, STEPS + 1):
        first: dict[str, float] = {}
        if step > 0 and step % every == 0:
            first = {"drift_norm": drifts[step // every - 1], "drift_cosine": 0.99}
        second = {"eval_loss": evaluations[step]} if step in evaluations else {}
        records += [record(0, step, {"forward": 0.9}, **first), record(1, step, {"forward": 0.9}, **second)]
    facts = about([(0, 15), (15, 30)], [[0], [1]], **{"learning_rate": 1e-4, **RECONSTRUCTION, **flags})
    return write_run(folder, records, facts | {"num_steps": planned})


def found(folder: Path, *given: Any, **more: Any) -> list[tuple[str, str]]:
    return [(advice.kind, advice.text) for advice in harm(read_run(made_run(folder, *given, **more)))]


def test_a_held_out_loss_that_ends_above_its_start(tmp_path: Path) -> None:
    """The figures of docs/method.md, at equal rates."""
    assert found(tmp_path, {0: 1.69, 20: 2.25, 40: 2.49}) == [
        (
            "warn",
            f"The run has made the model worse: its held-out task loss was 1.69 before the first step and is 2.49 "
            f"after step 40. {CURE}",
        )
    ]


def test_a_held_out_loss_that_ends_below_its_start(tmp_path: Path) -> None:
    assert found(tmp_path, {0: 1.69, 20: 1.2, 40: 1.07}) == []
    assert found(tmp_path, {40: 1.07}) == found(tmp_path) == []


@pytest.mark.parametrize(("end", "number"), [(1.6907, 0), (1.71, 1), (math.inf, 1), (math.nan, 1)])
def test_rounding_is_no_harm(end: float, number: int, tmp_path: Path) -> None:
    warned = found(tmp_path, {0: 1.69, 40: end})
    assert len(warned) == number
    assert all(f"is {'1.71' if end == 1.71 else 'inf'} after step 40" in text for _, text in warned)


def test_without_an_evaluation_before_the_first_step_the_first_one_counts(tmp_path: Path) -> None:
    first, second = found(tmp_path, {10: 1.5, 20: 1.7, 40: 2.0})
    assert first[0] == second[0] == "warn"
    assert first[1] == (
        f"The run has made the model worse: its held-out task loss was 1.5 after step 10, when it was first measured, "
        f"and is 2 after step 40. (--eval_on_start would tell what the pretrained model's is.) {CURE}"
    )
    assert second[1].startswith("The held-out task loss was lowest after step 10, 1.5, and rose again to 2 at step 40.")


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ({"method": "frozen"}, "Lower --learning_rate."),
        ({"method": "e2e"}, "Lower --learning_rate."),
        ({"local_objective": "none"}, "Lower --learning_rate."),
        ({"local_learning_rate": 2e-6}, CURE.replace("1e-05", "2e-06")),
        (
            NEXT_TOKEN | {"local_head_warmup_steps": 5},
            "What helps, in this order: a lower --local_learning_rate (it is 5e-05), or --method frozen, which leaves "
            "the earlier stages as they are (see docs/quality.md).",
        ),
        ({"local_objective": "mine:Own"}, CURE.replace(" (it is 1e-05)", "")),
    ],
)
def test_what_helps_depends_on_the_method(flags: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    ((kind, text),) = found(tmp_path, {0: 1.0, 40: 2.0}, **flags)
    assert kind == "warn" and text.endswith(f"is 2 after step 40. {remedy}")


def test_a_held_out_loss_that_rises_again(tmp_path: Path) -> None:
    losses = {0: 2.0, 10: 1.0, 20: 1.2, 40: 1.5}
    assert found(tmp_path, losses) == [
        (
            "warn",
            "The held-out task loss was lowest after step 10, 1, and rose again to 1.5 at step 40. "
            "--load_best_model_at_end saves the best checkpoint instead of the last model; fewer steps may do, too.",
        )
    ]
    # A tenth of what was won is not much; nor is a hundredth of the loss.
    assert found(tmp_path, {0: 2.0, 10: 1.0, 40: 1.09}) == found(tmp_path, {0: 1.02, 10: 1.0, 40: 1.009}) == []
    # Both: above its lowest, and above its start.
    assert [kind for kind, _ in found(tmp_path, losses | {40: 2.5})] == ["warn", "warn"]


def test_the_best_model_is_judged_where_it_is_the_one_that_is_saved(tmp_path: Path) -> None:
    """Of step 20: there is no checkpoint of step 10, and none of the pretrained model."""
    best = {"load_best_model_at_end": True, "save_steps": 20}
    assert found(tmp_path, {0: 2.0, 10: 1.0, 20: 1.2, 40: 2.5}, **best) == [
        (
            "good",
            "The held-out task loss was lowest after step 10, 1, and rose again to 2.5 at step 40; by "
            "--load_best_model_at_end the model is that of step 20.",
        )
    ]
    ((kind, text),) = found(tmp_path, {0: 1.0, 20: 1.2, 40: 2.5}, **best)
    assert kind == "warn" and "was 1 before the first step and is 1.2 after step 20" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (RECONSTRUCTION, []),
        (RECONSTRUCTION | {"local_learning_rate": 3e-5}, ["at 3e-05, ", "up to 0.1 of --learning_rate, 1e-05 here"]),
        (RECONSTRUCTION | {"local_learning_rate": 1e-4 * 0.1}, []),
        (RECONSTRUCTION | {"local_learning_rate": 0.1, "learning_rate": 0.0}, ["at 0.1, ", "--learning_rate, 0 here"]),
        (RECONSTRUCTION | {"local_learning_rate": 1.0, "method": "frozen"}, []),
        (RECONSTRUCTION | {"local_learning_rate": 1.0, "method": "e2e"}, []),
        (NEXT_TOKEN | {"local_head_warmup_steps": 5}, []),
        (NEXT_TOKEN | {"local_head_warmup_steps": 0}, ["harm without --local_head_warmup_steps"]),
        (NEXT_TOKEN | {"local_head_warmup_steps": 0, "auxiliary_choice": "all"}, []),
        (NEXT_TOKEN | {"auxiliary_choice": "all", "local_learning_rate": 1e-4}, []),
        (NEXT_TOKEN | {"auxiliary_choice": "all", "local_learning_rate": 2e-4}, ["up to 1 of --learning_rate, 0.0001"]),
        (NEXT_TOKEN | HALF | {"auxiliary_choice": "all", "local_learning_rate": 1e-4}, ["up to 0.5 of"]),
        (NEXT_TOKEN | {"local_head_warmup_steps": 0, "local_learning_rate": 0.0}, []),
        (
            NEXT_TOKEN | {"local_head_warmup_steps": 5, "local_learning_rate": 2e-4},
            ["at 0.0002", "up to 0.5 of", "5e-05"],
        ),
        ({"local_objective": "os:system", "local_learning_rate": 1.0}, []),
        ({"local_objective": "none", "local_learning_rate": 1.0}, []),
    ],
)
def test_a_rate_outside_of_the_safe_range(flags: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    warned = found(tmp_path, **flags)
    assert [kind for kind, _ in warned] == (["warn"] if words else [])
    assert all(word in text and "(see docs/quality.md)" in text for word in words for _, text in warned)


def test_runs_of_unknown_flags_are_not_judged_by_them(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [record(stage, 1, {"forward": 0.9}) for stage in (0, 1)]))
    assert harm(run) == []


def test_the_default_rates_are_safe() -> None:
    """And an objective that nobody has measured claims nothing."""
    for name, rates in LOCAL_RATES.items():
        assert rates.rate_share <= rates.safe_rate_share, name
    assert Objective.safe_rate_share is NextToken.safe_rate_share is None


@pytest.mark.parametrize("name", LOCAL_RATES)
def test_the_report_judges_by_the_rates_that_a_run_learns_at(name: str) -> None:
    """The report reads a table in place of the classes; this class was found by its flag, as a run finds it."""
    kind = local_objective_class(ObjectiveConfig(local_objective=name))
    assert kind is {"reconstruction": Reconstruction, "next_token": AuxiliaryNextToken}[name]
    taken = LocalRates(kind.rate_share, kind.safe_rate_share or 0.0, kind.needs_head_warmup)
    assert taken == LOCAL_RATES[name]


DRIFTS: dict[str, tuple[Callable[[float], float], bool]] = {
    "straight on": (lambda t: t, True),
    "a random walk": (math.sqrt, True),
    "a linear schedule": (lambda t: 2 * t - t * t, False),
    "a cosine schedule": (lambda t: t + math.sin(math.pi * t) / math.pi, False),
    "at once": (lambda t: 1 - math.exp(-20 * t), False),
    "and back": (lambda t: 1 - t, False),
    "not at all": (lambda t: 0.0, False),
}
"""Drifts over the share of the run, and whether they keep growing."""


@pytest.mark.parametrize("name", DRIFTS)
@pytest.mark.parametrize("number", [4, 8, 21, 400])
def test_what_keeps_growing(name: str, number: int) -> None:
    drift, grows = DRIFTS[name]
    assert keeps_growing(quarters([drift((at + 1) / number) for at in range(number)])) == grows


def test_quarters() -> None:
    assert quarters([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 9.0]) == [1.5, 3.5, 5.5, 8.0]
    assert quarters([1.0, 2.0, 3.0]) == [] and not keeps_growing([])


def test_a_drift_that_keeps_growing(tmp_path: Path) -> None:
    growing = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    moved = "At the boundary after stage 0 the hidden states have moved by 80.0% of their norm from the pretrained "
    moved += (
        "model's (cosine 0.9900), and keep moving: the means of the run's quarters are 15.0%, 35.0%, 55.0% and 75.0%"
    )
    remedy = "Lower --local_learning_rate, or have the stage stop by --max_interface_drift."
    assert found(tmp_path, drifts=growing) == [("warn", f"{moved}. {remedy}")]
    # Of a run that goes on nobody knows.
    assert found(tmp_path, drifts=growing, planned=41) == [("look", f"{moved} so far; at first that is usual.")]
    made = made_run(tmp_path, drifts=growing, planned=41)
    (made / "stopped.json").write_text('{"step": 40}')
    assert [advice.kind for advice in harm(read_run(made))] == ["warn"]


@pytest.mark.parametrize(
    ("drifts", "kind"),
    [
        ([0.3, 0.36, 0.39, 0.4], "good"),
        ([0.3, 0.6, 0.69, 0.7], "look"),
        ([0.01, 0.02, 0.03, 0.04], "good"),
        ([0.2], "good"),
    ],
)
def test_a_drift_that_has_settled_or_is_slight_is_named(drifts: list[float], kind: str, tmp_path: Path) -> None:
    (named,) = found(tmp_path, drifts=drifts)
    text = f"moved by {drifts[-1]:.1%} of their norm from the pretrained model's (cosine 0.9900)."
    more = "The stages after it can follow such changes."
    if kind == "look":
        more = "That is much, though it grows no faster: a lower --local_learning_rate keeps them closer."
    assert named == (kind, f"At the boundary after stage 0 the hidden states have {text} {more}")


def test_warnings_are_on_the_page_and_on_the_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = made_run(tmp_path, {0: 1.0, 40: 2.0})
    assert cli.main(["report", str(made)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"the report is {made / 'report.html'}\n"
    assert printed.err.startswith("lopt-pp: warning: The run has made the model worse") and printed.err.count("\n") == 1
    html = (made / "report.html").read_text(encoding="utf-8")
    assert '<li class="warn"><b>Warning:</b> The run has made the model worse' in html
    assert ".advice .warn {" in html
