"""What crosses a boundary in each step, message by message."""

from collections.abc import Iterator

from lopt_pp.data import MicrobatchSampler
from lopt_pp.metrics.drift import Probe
from lopt_pp.pipeline.messages import Header, dtype_code
from lopt_pp.stage.stage import Stage
from lopt_pp.training.held_out import START, Evaluation


def stream_headers(
    sampler: MicrobatchSampler,
    steps: range,
    stage: Stage,
    boundary: int = 0,
    probe: Probe | None = None,
    evaluation: Evaluation | None = None,
) -> Iterator[Header]:
    """What crosses a boundary in some steps, message by message, as either end derives it from its own data order.

    Args:
        sampler: of the data.
        steps: of the run.
        stage: at one end of the boundary.
        boundary: the stage that sends.
        probe: adds a message to some steps; None to none.
        evaluation: adds its rows' after that, as further microbatches of some steps.
    """
    hidden_size = stage.block.model.config.hidden_size
    for step in steps:
        shapes: list[tuple[int, int]] = []
        if step != START:
            shapes += [*sampler.shapes(step), *(probe.crossing(boundary, step) if probe is not None else ())]
        if evaluation is not None and evaluation.is_due(step + 1):
            shapes += evaluation.shapes
        for microbatch, (rows, tokens) in enumerate(shapes):
            yield Header(step, microbatch, rows, tokens, hidden_size, dtype_code(stage.dtype))
