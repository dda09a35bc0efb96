"""Plain advice from what a run has measured."""

from collections.abc import Sequence

from lopt_pp.report.charts import Line, downsample, means
from lopt_pp.report.harm import harm
from lopt_pp.report.page import Advice
from lopt_pp.report.run_data import RunData, StageTimes
from lopt_pp.util.linear_partition import linear_partition

_IDLE = 0.05
"""The share of its time that the busiest stage may wait before something is wrong."""

_WORTH_IT = 0.03
"""The share of the busiest stage's time below which the gain of another cut is not mentioned."""


def advise(run: RunData) -> list[Advice]:
    """All advice on a run, the warnings first."""
    times = [run.times(stage) for stage in range(len(run.stages))]
    advice: list[Advice] = []
    if any(time.seconds["schedule"] > 0 for time in times):
        advice.append(
            Advice(
                "good",
                "The model was trained end to end (--method e2e): its times are those of PyTorch's 1F1B schedule, with "
                "its waits. That schedule pads all microbatches of a step to the same length; local learning and other "
                "1F1B schedules need not, so give --packing to runs whose times you compare.",
            )
        )
    elif len(run.stages_of_processes) > 1:
        advice += [*_bottleneck(run, times), *_split(run, times), *_queue(run, times)]
    elif len(run.stages) > 1:
        advice.append(
            Advice(
                "good",
                "All stages share a process and take turns, so none waits for another. Processes of their own would "
                "let them compute at the same time.",
            )
        )
    advice += [*_overhead(run, times), *_losses(run), *harm(run), *_clipping(run)]
    return sorted(advice, key=lambda one: one.kind != "warn")


def _bottleneck(run: RunData, times: Sequence[StageTimes]) -> list[Advice]:
    processes = run.stages_of_processes
    computing = [sum(times[stage].computing for stage in stages) for stages in processes]
    busiest = max(range(len(processes)), key=lambda process: computing[process])
    share = computing[busiest] / times[processes[busiest][0]].wall
    others = [seconds for process, seconds in enumerate(computing) if process != busiest]
    which = _named(processes[busiest])
    if min(others) > (1 - _IDLE) * computing[busiest]:
        return [
            Advice(
                "good",
                f"The stages are balanced: all compute for about as long in a step, the busiest ({which}) {share:.0%} "
                f"of the time. There is nothing to change.",
            )
        ]
    least = f"{min(others) / computing[busiest]:.0%}"
    much = least if len(others) == 1 else f"{least} to {max(others) / computing[busiest]:.0%}"
    return [
        Advice(
            "look",
            f"{which.capitalize()} is the bottleneck: it computes for {_seconds(computing[busiest])} in each step, "
            f"{share:.0%} of the time, and the other{'' if len(others) == 1 else 's'} for {much} of that. The run is "
            f"as fast as {which}.",
        )
    ]


def _split(run: RunData, times: Sequence[StageTimes]) -> list[Advice]:
    layers = run.layers
    if layers is None or any(len(stages) > 1 for stages in run.stages_of_processes):
        return []
    now = max(time.computing for time in times)
    cuts, then = better_cuts([time.computing for time in times], layers)
    if now - then < _WORTH_IT * now:
        gain = f"{100 * _WORTH_IT:.0f}%"
        return [
            Advice(
                "good",
                f"The cuts lie where they should: by the measured time of a layer, no other --split would make the run "
                f"{gain} faster.",
            )
        ]
    old = ",".join(str(start) for start, _ in layers[1:])
    return [
        Advice(
            "do",
            f"Try --split {','.join(map(str, cuts))} instead of {old} to balance the stages: by the measured time of a "
            f"layer, the busiest stage would compute for {_seconds(then)} in a step instead of {_seconds(now)}, which "
            f"is up to {now / then - 1:.0%} more tokens per second. Each stage then learns other layers by its own "
            f"loss, so compare the held-out losses, too.",
        )
    ]


def better_cuts(computing: Sequence[float], layers: Sequence[tuple[int, int]]) -> tuple[list[int], float]:
    """The cuts that keep the busiest stage's time shortest, by the measured times of the stages as they are.

    A layer of an earlier stage costs that stage's time over its number of layers. On the last stage a layer costs what
    one of the stage before does, and the output head costs the rest.

    Args:
        computing: seconds of each stage in a step.
        layers: first layer of each stage and the one after its last.

    Returns:
        The first layer of each stage after the first, and the seconds of the busiest stage then.
    """
    *earlier, last = [stop - start for start, stop in layers]
    each = [seconds / number for seconds, number in zip(computing, earlier, strict=False)]
    each.append(min(each[-1], computing[-1] / last))
    head = computing[-1] - last * each[-1]
    cost = [each[stage] for stage, (start, stop) in enumerate(layers) for _ in range(start, stop)]
    depth = len(cost)

    def stage_cost(_: int, start: int, stop: int) -> float:
        return sum(cost[start:stop]) + (head if stop == depth else 0.0)

    return linear_partition(0, depth, [1] * len(layers), stage_cost)


def _queue(run: RunData, times: Sequence[StageTimes]) -> list[Advice]:
    busiest = max(times, key=lambda time: time.computing)
    waits, depth = busiest.share("wait_receive"), run.flags.get("queue_depth", 2)
    if busiest.stage == 0 or waits <= _IDLE:
        return [
            Advice(
                "good",
                f"The queue between the stages is deep enough (--queue_depth {depth}): the busiest stage waits "
                f"{waits:.1%} of the time to receive hidden states.",
            )
        ]
    before = times[busiest.stage - 1]
    if before.share("wait_send") > 0.01:
        return [
            Advice(
                "do",
                f"Stage {busiest.stage} computes the most, and yet waits {waits:.0%} of the time to receive hidden "
                f"states, while stage {before.stage} waits {before.share('wait_send'):.0%} of the time to send some: "
                f"the queue between them is too short for the link's delay, or for rows of such different lengths. Try "
                f"--queue_depth {2 * depth}.",
            )
        ]
    return [
        Advice(
            "look",
            f"Stage {busiest.stage} computes the most, and yet waits {waits:.0%} of the time to receive hidden states, "
            f"while stage {before.stage} never waits to send some: a deeper queue would not help. Either the link is "
            f"too slow for one message per microbatch (lopt-pp check measures it), or now the one stage needs longer "
            f"for a step and now the other: rows of similar length in a step help (--packing).",
        )
    ]


def _overhead(run: RunData, times: Sequence[StageTimes]) -> list[Advice]:
    # Where stages share a process, what one does is `other` to the next.
    other = min(1 - sum(1 - times[stage].share("other") for stage in stages) for stages in run.stages_of_processes)
    if other > 0.1:
        return [
            Advice(
                "look",
                f"At least {other:.0%} of the time goes to what is neither computing nor waiting: reading rows, and "
                f"what has to be done once for each microbatch or step. Where steps are short, larger microbatches "
                f"help (--per_device_train_batch_size).",
            )
        ]
    return []


def _losses(run: RunData) -> list[Advice]:
    advice = []
    last = len(run.stages) - 1
    for stage in range(len(run.stages)):
        name, remedy = (
            ("loss", "--learning_rate") if stage == last else (run.local_loss(stage), "--local_learning_rate")
        )
        if name is not None:
            called = "task loss" if stage == last else name.replace("_", " ")
            values = means(downsample(Line(name, *run.curve(stage, name))).ys)
            if (
                len(values) >= 10
                and values[-1] > 1.1 * min(values)
                and values[-1] - min(values) > 0.1 * (max(values) - min(values))
            ):
                advice.append(
                    Advice(
                        "look",
                        f"The {called} of stage {stage} rises: it was {min(values):.4g} at its lowest and is "
                        f"{values[-1]:.4g}. A lower {remedy} may help.",
                    )
                )
    return advice


def _clipping(run: RunData) -> list[Advice]:
    limit = run.flags.get("max_grad_norm")
    if not limit:
        return []
    advice = []
    for stage in range(len(run.stages)):
        norms = run.curve(stage, "grad_norm")[1]
        clipped = sum(norm > limit for norm in norms) / max(len(norms), 1)
        if clipped > 0.9 and len(norms) >= 10:
            advice.append(
                Advice(
                    "look",
                    f"The gradient of stage {stage} is clipped in {clipped:.0%} of the steps (--max_grad_norm "
                    f"{limit:g}): its norm is above that, and is scaled down to it. AdamW does not mind, since it "
                    f"divides by the gradient's usual size. If the loss jumps, lower the learning rate; if clipping is "
                    f"not what you want, raise --max_grad_norm.",
                )
            )
    return advice


def _named(stages: Sequence[int]) -> str:
    return f"stage {stages[0]}" if len(stages) == 1 else f"the process of stages {', '.join(map(str, stages))}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.0f} ms"
