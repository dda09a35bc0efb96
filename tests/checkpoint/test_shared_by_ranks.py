"""What ranks share: each flag does what it declares."""

import re
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig
from two_configs import MODEL, make, rows, two_configs

from lopt_pp.checkpoint.compatibility import in_words, shared_by_ranks
from lopt_pp.config.train_config import EFFECTS
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError


def check_ranks(facts: Mapping[str, object], other: Mapping[str, object]) -> None:
    store = dist.HashStore()
    for rank, own in enumerate((facts, other)):
        World(rank, 2, torch.device("cpu"), "gloo", store, store).check_consistent(own, in_words)


@pytest.mark.parametrize("name", EFFECTS)
def test_ranks_share_the_flags_that_say_so(name: str) -> None:
    first, second = (shared_by_ranks(config, MODEL, rows(), rows("held")) for config in two_configs(name))
    if not EFFECTS[name].shared_by_ranks:
        return check_ranks(first, second)
    said = f"rank 0 and rank 1 disagree on --{name}: {first[name]!r} against {second[name]!r}; all processes must be"
    with pytest.raises(LoptError, match=f"^{re.escape(said)} given the same$"):
        check_ranks(first, second)


def test_ranks_share_what_they_read() -> None:
    config = make()
    own = shared_by_ranks(config, MODEL, rows(), rows("held"))
    check_ranks(own, dict(own))
    others = {
        "the training rows (sha256)": shared_by_ranks(config, MODEL, rows("other"), rows("held")),
        "the evaluation rows (sha256)": shared_by_ranks(config, MODEL, rows(), rows("other")),
        "the model's config": shared_by_ranks(config, LlamaConfig(num_hidden_layers=5), rows(), rows("held")),
        "the version of torch": own | {"torch_version": "1.0"},
        "the version of transformers": own | {"transformers_version": "1.0"},
    }
    for words, other in others.items():
        with pytest.raises(LoptError, match=f"^rank 0 and rank 1 disagree on {re.escape(words)}: "):
            check_ranks(own, other)
