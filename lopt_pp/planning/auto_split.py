"""`--split auto`: finds the cuts by a short timing of the model's parts."""

import logging
import statistics

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.config.topology import Topology
from lopt_pp.config.train_config import Config
from lopt_pp.data import MicrobatchSampler
from lopt_pp.model.structure import ModelStructure
from lopt_pp.planning.balance import balance
from lopt_pp.planning.profile import measure

logger = logging.getLogger(__name__)

_STEPS = 20
"""Of the run, whose microbatches say how long a usual one is."""


def find_cuts(
    config: Config,
    topology: Topology,
    model_class: type[PreTrainedModel],
    model_config: PreTrainedConfig,
    structure: ModelStructure,
    sampler: MicrobatchSampler,
    device: torch.device,
) -> list[int]:
    """Times the model's parts on microbatches as the data has them, logs what it found, and balances the stages.

    Args:
        config: the flags.
        topology: of the run.
        model_class: the whole model's class.
        model_config: the whole model's config.
        structure: of the class.
        sampler: of the data.
        device: to measure on.

    Returns:
        The first layer of each stage after the first.
    """
    rows, tokens = zip(*(shape for step in range(_STEPS) for shape in sampler.shapes(step)), strict=True)
    shape = max(rows), round(statistics.median(tokens))
    costs = measure(
        model_class,
        model_config,
        structure,
        shape,
        config.run.gradient_accumulation_steps,
        config.objective,
        config.optim,
        config.stage,
        device,
    )
    specs = balance(costs, [len(topology.stages_of(rank)) for rank in topology.ranks_of_replica(0)])
    busy = (costs.of(spec.start, spec.stop, num_local_heads=0 if spec.is_last else 1) for spec in specs)
    logger.info("--split auto: of a microbatch of %d x %d tokens, %s", *shape, costs)
    logger.info("--split auto: stages of %s ms", ", ".join(f"{1e3 * seconds:.1f}" for seconds in busy))
    return [spec.start for spec in specs[1:]]
