"""The training loop of one process: data -> receive -> forward -> send -> local loss -> backward -> step.

The same loop runs in every process, over the stages that it holds. It waits for nobody but the neighbour before it (for
the next hidden states) and, when the queue is full, the neighbour after it.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from lopt_pp.metrics.clock import peak_memory
from lopt_pp.metrics.records import Record
from lopt_pp.metrics.state import Activity
from lopt_pp.stage.base import BaseStage
from lopt_pp.training.late_reports import late_reports
from lopt_pp.training.segment import Segment
from lopt_pp.training.step_plan import START, StepPlan

AnyStage = TypeVar("AnyStage", bound=BaseStage)


def train(
    segment: Segment[AnyStage],
    plan: StepPlan[AnyStage],
    steps: Iterable[int],
    report: Callable[[Record], None],
    after_step: Callable[[int], None] = lambda steps_done: None,
    on_activity: Callable[[Activity, int], None] = lambda activity, steps_done: None,
    on_trained: Callable[[Record], None] = lambda record: None,
) -> None:
    """Trains the stages of this process for some optimizer steps.

    Args:
        segment: the stages, joined to their neighbours.
        plan: what each step consists of, the same in every process.
        steps: of the run, to make unless the segment's stop signal, or rows that cannot be used, end it before. The
            first may be `START`, of which there is only the evaluation.
        report: called with one record per step and stage, in order, see `docs/metrics.md`; on a GPU mostly while the
            next step runs, and of the last step before this returns or raises.
        after_step: called with the number of steps done, when all stages of this process have made the step.
        on_trained: called before the evaluation of a step, if it has one, with what the step's record has so far, and
            its `step_seconds` so far: whoever looks on does not wait for the evaluation.
        on_activity: called before each phase with what it does, and the number of steps done before the step.

    Raises:
        NotFiniteError: a stage's loss or gradient is not finite; its weights are those of the last good step.
        StreamError: a neighbour is gone, or disagrees.
    """

    def place(step: int, stage: BaseStage) -> Record:
        return {"step": step + 1, "stage": stage.index, "epoch": plan.sampler.epoch(step)}

    with late_reports(report) as tell:
        for step in itertools.takewhile(lambda step: not plan.unusable(step) and segment.stop_signal.runs(step), steps):
            records: dict[int, Record] = {stage.index: {"num_tokens": 0, "num_targets": 0} for stage in segment.stages}
            begun, is_told = time.perf_counter(), step == START
            for phase in plan.phases(step):
                if phase.activity == "evaluating" and not is_told:
                    is_told = True
                    tell.deliver_known()  # All but what this step was: its losses are known, so those before are.
                    for stage in segment.stages:
                        so_far = {"step_seconds": time.perf_counter() - begun}
                        on_trained(records[stage.index] | place(step, stage) | so_far)
                on_activity(phase.activity, max(step, 0))
                for index, record in phase.run(step, segment).items():
                    records[index] |= record
            for stage in segment.stages:
                memory = {"peak_memory_bytes": peak_memory(stage.device)}
                tell(records[stage.index], segment.clocks[stage.index].end_step(), place(step, stage) | memory)
            if step != START:
                after_step(step + 1)
    segment.close()
