"""Whether a run has done harm to its model, as far as its figures tell, and what helps.

Local learning can do harm: the blocks before the last know little of the task, or nothing. Fixed rules say what is
harm, so that all runs are judged alike: a task loss on the held-out rows above its start or its lowest, a boundary that
keeps moving away from the pretrained model's, and a rate that measurements have not found safe.
"""

import math

from lopt_pp.config.objective import ALL, LOCAL_RATES
from lopt_pp.report.page import Advice
from lopt_pp.report.results import held_out, held_out_points
from lopt_pp.report.run_data import RunData

_ROUNDING = 1e-3
"""The share of a loss by which two measurements of the same model may differ: other microbatches, bfloat16."""

_CLEARLY, _PART = 0.01, 0.1
"""A loss has risen again once it is above its lowest by this share of it, and by this part of what had been gained."""

_QUARTERS = 4

_PACE = 2 / 3
"""A drift keeps growing where it grows in the last quarter by at least this share of its mean growth per quarter. The
share is 1 for steady growth, 0.73 for a random walk, and at most 0.5 where the steps get shorter, as in a linear
schedule of the learning rate."""

_SLIGHT = 0.05
"""The drift that is not worth a warning, however it grows."""

_MUCH = 0.5
"""The drift that is worth a look, whether it grows or not."""


def harm(run: RunData) -> list[Advice]:
    """Warnings of harm; of a boundary whose drift gives no reason for one, what the drift is."""
    return [*_held_out(run), *_rate(run), *_drift(run)]


def _held_out(run: RunData) -> list[Advice]:
    """Of the task loss on each set of held-out rows."""
    return [
        advice for rows, name in run.held_out.items() for advice in _of_rows(run, name, f" on {rows}" if rows else "")
    ]


def _of_rows(run: RunData, name: str, where: str) -> list[Advice]:
    """Of the task loss on some held-out rows, from its first measurement to that of the model which is saved."""
    points, measured = held_out_points(run, name), held_out(run, name)
    if len(points) < 2 or measured is None or measured.first == math.inf:
        return []
    start, first, lowest, at = measured.first, measured.first_step, measured.lowest, measured.lowest_step
    end, last = points[-1]
    advice = []
    if measured.saved > (1 + _ROUNDING) * start:
        when, more = "before the first step", ""
        if first > 0:
            when = f"after step {first}, when it was first measured,"
            more = " (--eval_on_start would tell what the pretrained model's is.)"
        text = f"The run has made the model worse: its held-out task loss{where} was {start:.4g} {when}"
        is_now = f"and is {measured.saved:.4g} after step {measured.saved_step}."
        advice.append(Advice("warn", f"{text} {is_now}{more} {_remedies(run)}"))
    if at == 0 or end <= (1 + _CLEARLY) * lowest or end - lowest <= _PART * (start - lowest):
        return advice
    rises = f"after step {at}, {lowest:.4g}, and rose again to {end:.4g} at step {last}"
    text = f"The held-out task loss{where} was lowest {rises}"
    if measured.saved_step == last:
        remedy = (
            "--load_best_model_at_end saves the best checkpoint instead of the last model; fewer steps may do, too."
        )
        return [*advice, Advice("warn", f"{text}. {remedy}")]
    by = f"by --load_best_model_at_end the model is that of step {measured.saved_step}"
    return [*advice, Advice("good", f"{text}; {by}.")]


def _remedies(run: RunData) -> str:
    """What helps where the model has become worse, the gentlest first."""
    local, rate = _local_objective(run), _local_rate(run)
    if local is None:
        return "Lower --learning_rate."
    parts = ["a lower --local_learning_rate" + (f" (it is {rate:.3g})" if rate is not None else "")]
    if local != "next_token":
        parts.append("--local_objective next_token with --auxiliary_choice all")
    parts.append("--method frozen, which leaves the earlier stages as they are")
    return f"What helps, in this order: {', '.join(parts[:-1])}, or {parts[-1]} (see docs/quality.md)."


def _local_objective(run: RunData) -> str | None:
    """What the stages before the last learn from, as its flag names it; None where nothing."""
    local = run.flags.get("local_objective", "reconstruction") if run.flags.get("method", "lopt") == "lopt" else "none"
    return None if local == "none" or len(run.stages) == 1 else local


def _local_rate(run: RunData) -> float | None:
    """The peak rate of the stages before the last; None where it is not known."""
    given, rates = run.flags.get("local_learning_rate"), LOCAL_RATES.get(_local_objective(run) or "")
    if given is not None or rates is None or "learning_rate" not in run.flags:
        return given
    return rates.rate_share * run.flags["learning_rate"]


def _rate(run: RunData) -> list[Advice]:
    """Of rates outside of what was measured to be safe for the objective."""
    local, rate = _local_objective(run), _local_rate(run)
    rates = LOCAL_RATES.get(local or "")
    if rates is None or rate is None or "learning_rate" not in run.flags:
        return []
    advice = []
    starts_whole = run.flags.get("auxiliary_choice") == ALL
    learns_all = run.flags.get("local_accumulation_steps") in (None, run.flags.get("gradient_accumulation_steps", 1))
    # A network of all layers that learns from all microbatches is end-to-end training, and safe where that is.
    share = 1 if starts_whole and learns_all else rates.safe_rate_share
    safe = share * run.flags["learning_rate"]
    if rate > safe and not math.isclose(rate, safe):
        advice.append(
            Advice(
                "warn",
                f"The stages before the last learn at {rate:.3g}, which is above the safe range for {local}: up to "
                f"{share:g} of --learning_rate, {safe:.3g} here. Runs above it were measured to do "
                f"harm. Lower --local_learning_rate (see docs/quality.md).",
            )
        )
    if rates.needs_head_warmup and rate > 0 and not starts_whole and not run.flags.get("local_head_warmup_steps"):
        advice.append(
            Advice(
                "warn",
                f"{local} was measured to do harm without --local_head_warmup_steps: its loss starts high, and moves "
                f"the pretrained layers before the head on them has settled. Give it some (see docs/quality.md).",
            )
        )
    return advice


def _drift(run: RunData) -> list[Advice]:
    """Of each boundary: how far it is from the pretrained model's, and whether it goes on moving at its pace."""
    advice = []
    for stage in range(len(run.stages) - 1):
        norms, cosines = (run.curve(stage, name)[1] for name in ("drift_norm", "drift_cosine"))
        if not norms:
            continue
        text = (
            f"At the boundary after stage {stage} the hidden states have moved by {norms[-1]:.1%} of their norm from "
            f"the pretrained model's (cosine {cosines[-1]:.4f})"
        )
        means = quarters(norms)
        if norms[-1] < _SLIGHT or not keeps_growing(means):
            if norms[-1] >= _MUCH:
                much = "That is much, though it grows no faster: a lower --local_learning_rate keeps them closer."
                advice.append(Advice("look", f"{text}. {much}"))
            else:
                advice.append(Advice("good", f"{text}. The stages after it can follow such changes."))
            continue
        listed = f"{', '.join(f'{mean:.1%}' for mean in means[:-1])} and {means[-1]:.1%}"
        text += f", and keep moving: the means of the run's quarters are {listed}"
        if run.is_over:
            remedy = "Lower --local_learning_rate, or have the stage stop by --max_interface_drift."
            advice.append(Advice("warn", f"{text}. {remedy}"))
        else:
            advice.append(Advice("look", f"{text} so far; at first that is usual."))
    return advice


def quarters(values: list[float]) -> list[float]:
    """The means of the four quarters of some values; empty where there are fewer than four."""
    number = len(values)
    if number < _QUARTERS:
        return []
    edges = [number * quarter // _QUARTERS for quarter in range(_QUARTERS + 1)]
    parts = [values[begin:end] for begin, end in zip(edges, edges[1:], strict=False)]
    return [sum(part) / len(part) for part in parts]


def keeps_growing(means: list[float]) -> bool:
    """Whether what has these means in its quarters goes on growing to the end, at nearly its mean pace."""
    if not means:
        return False
    pace = (means[-1] - means[0]) / (_QUARTERS - 1)
    return pace > 0 and means[-1] - means[-2] >= _PACE * pace
