"""Finds out how long a row may be: some families look positions up in a table that ends."""

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lopt_pp.model.verify import TOKENS, miniature, miniature_config


def trained_positions(config: PreTrainedConfig) -> int | None:
    """The most tokens that a model was made for; None where its config does not say it."""
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def row_limits(model: PreTrainedModel, longest: int) -> tuple[int, int, int | None, int | None]:
    """What a whole model can take of a row, in the order of `lopt_pp.data.RowLimits`.

    Args:
        model: may be on the meta device.
        longest: row that there is to be; no table is looked for where it cannot be too short.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embeddings.weight, torch.Tensor) and isinstance(head.weight, torch.Tensor)
    trained = trained_positions(model.config)
    limit = position_limit(type(model), model.config) if trained is not None and longest > trained else None
    return embeddings.weight.shape[0], head.weight.shape[0], limit, trained


def position_limit(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> int | None:
    """The most tokens of a row that a model can compute on at all; None where it has no end.

    GPT-2 and OPT have an embedding for each position, GPT-J a table of angles; most others compute what a position
    needs. Which of these a class does is tried on a miniature that is made for a few positions, with one more.

    Args:
        model_class: the whole model's class.
        config: the whole model's config.
    """
    limit = trained_positions(config)
    if limit is None:
        return None
    small = miniature_config(config, widest_head=32)
    small.max_position_embeddings = TOKENS
    try:
        with miniature(model_class, small) as whole:
            whole(input_ids=torch.ones(1, TOKENS, dtype=torch.int64), use_cache=False)
            try:
                whole(input_ids=torch.ones(1, TOKENS + 1, dtype=torch.int64), use_cache=False)
            except (IndexError, RuntimeError):
                return limit
    except Exception:  # Such a miniature cannot be made or run, so it tells nothing.
        return None
    return None
