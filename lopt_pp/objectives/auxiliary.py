"""Next-token learning before the last block: an auxiliary network in place of the rest of the model."""

import torch
from torch import nn

from lopt_pp.config.objective import ALL, LOCAL_RATES
from lopt_pp.data import Microbatch, TokenCounts
from lopt_pp.errors import renamed_in_errors
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.model.partition import BlockSpec
from lopt_pp.objectives.base import Objective, Site
from lopt_pp.objectives.task import task_objective


class AuxiliaryNextToken(Objective):
    """A small copy of the rest of the model, on the block, learns the task; its gradient goes on into the block.

    The network is made of the pretrained model's own parts: some of the layers that follow the block, the final norm,
    and the output head, which is frozen. The layers are those at even distances (the construction of AugLocal, arXiv
    2402.17318), all that follow, or those that the user names. With all of them the network starts as the rest of the
    model, and the block's first gradient is that of end-to-end training. It sees what the last stage sees of the task,
    the same labels at the same places, and nothing of its weights.

    An example, a model of 30 layers cut at 15, with `--auxiliary_layers 3`: stage 0 trains the layers 0 to 14. On its
    output is a network of copies of the layers 19, 24 and 29, the final norm and the head. A microbatch goes through
    stage 0, its hidden states are sent on, and stage 0 runs them through its own network as well: the next-token loss
    there teaches the three copies, and through them the layers 0 to 14. Meanwhile stage 1 learns from the same labels
    with the layers 15 to 29. After the run the network is dropped.
    """

    name = "auxiliary_loss"
    rate_share = LOCAL_RATES["next_token"].rate_share
    safe_rate_share = LOCAL_RATES["next_token"].safe_rate_share
    reads_weights = False
    needs_head_warmup = LOCAL_RATES["next_token"].needs_head_warmup
    summary = "the next-token loss of a small auxiliary network on its output"

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.network = site.load(_layers(site))
        head = self.network.model.get_output_embeddings()
        head.requires_grad_(False)
        _share_frozen(site.block, head)
        self._task = task_objective(site.config)

    def count(self, counts: TokenCounts) -> int:
        return self._task.count(counts)

    def forward(self, output: BlockOutput, batch: Microbatch) -> torch.Tensor:
        logits = {"logits_to_keep": batch.target_positions, "leave_logits": True}
        return self._task(self.network(hidden_states=output.hidden_states, **logits), batch)


def _layers(site: Site) -> BlockSpec:
    spec, depth = site.block.spec, site.block.model.config.num_hidden_layers
    if site.config.chosen_layers is None:
        return spec.sample_after(depth, depth if site.config.auxiliary_choice == ALL else site.config.auxiliary_layers)
    with renamed_in_errors("the layers ", "--auxiliary_choice "):
        return spec.choose_after(depth, site.config.chosen_layers)


def _share_frozen(block: BlockModel, head: nn.Module) -> None:
    """Holds the output head and the input embedding once where they are the same (tied) and both of them are frozen."""
    embedding = getattr(block.model.get_input_embeddings(), "weight", None)
    if not isinstance(embedding, nn.Parameter) or embedding.requires_grad:
        return
    own = head.get_parameter("weight")
    if own.is_meta:  # A plan has no weights to compare; of a sharded stage a process has no more than its share.
        return
    if embedding.shape == own.shape and torch.equal(embedding, own):
        head.weight = embedding
