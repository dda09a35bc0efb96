"""Checks, before any work is done, that a model class keeps rows apart that share a sequence of a microbatch.

`transformers` tells by positions that start anew where a row ends, and masks attention across. Families whose layers
carry something else along (state-space and linear attention layers), or that take no positions, do not; they are
refused here instead of being trained wrongly.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec
from lopt_pp.model.structure import ModelStructure
from lopt_pp.model.verify import TOKENS, VOCABULARY, chain, miniature, miniature_config

_PACKS = ((6, 1, 4, 2), (TOKENS,), (3, 7, 3))
"""The lengths of the rows in each row of the miniature: longer than a sliding window, of one token, and alone."""

_TOLERANCE = 1e-3
"""Of the largest logit. Sums are rounded otherwise in other shapes; what sees another row is off by far more."""


def check_packing(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, specs: Sequence[BlockSpec], structure: ModelStructure
) -> None:
    """Proves on a miniature that rows which share a row do not see each other, through the blocks at `specs`.

    Args:
        model_class: the whole model's class.
        config: the whole model's config.
        specs: the blocks, in order.
        structure: of the class.

    Raises:
        LoptError: packed rows give other logits than each row by itself, or the class takes no positions.
    """
    name = f"{model_class.__name__} cannot be trained with --packing or --padding_free"
    failure = Exception()
    for widest_head in (32, None):  # As in `check_split`.
        try:
            difference = _packed_against_alone(model_class, miniature_config(config, widest_head), specs, structure)
            break
        except Exception as error:  # Whatever a class of transformers, or the user's own, may raise.
            failure = error
    else:
        raise LoptError(f"{name}: its miniature fails with: {first_line(failure)}; leave the flag out") from failure
    if difference > _TOLERANCE:
        raise LoptError(
            f"{name}: rows that share a row give other logits than each by itself (by {difference:.1%} of the "
            f"largest), since its layers do not keep them apart; leave the flag out"
        )


def _packed_against_alone(
    model_class: type[PreTrainedModel], small: PreTrainedConfig, specs: Sequence[BlockSpec], structure: ModelStructure
) -> float:
    """By how much the logits of packed rows differ from those of each by itself, as a share of the largest logit."""
    with miniature(model_class, small) as whole:
        input_ids = torch.randint(3, VOCABULARY, (len(_PACKS), TOKENS))
        position_ids = torch.stack([torch.cat([torch.arange(length) for length in pack]) for pack in _PACKS])
        builder = BlockBuilder(model_class, small, structure)
        packed = chain(builder, whole.state_dict(), specs, input_ids, position_ids)
        difference = 0.0
        for ids, logits, pack in zip(input_ids, packed, _PACKS, strict=True):
            for own, together in zip(ids.split(list(pack)), logits.split(list(pack)), strict=True):
                alone = whole(input_ids=own[None], use_cache=False).logits[0]
                difference = max(difference, (alone - together).abs().max().item())
        return difference / packed.abs().max().item()
