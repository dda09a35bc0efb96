"""Losses of finished models on rows, and how far two models' predictions are from each other."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lopt_pp.config.model import ModelConfig
from lopt_pp.data import IGNORE_INDEX, Microbatch, MicrobatchSampler, TokenizedRows
from lopt_pp.evaluation.scores import Score
from lopt_pp.model.block import BlockModel
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_at
from lopt_pp.model.pretrained import load_model_config, model_class_of
from lopt_pp.model.stored import warn_of_unused, without_quantization
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import Objective


def load_whole(config: ModelConfig) -> BlockModel:
    """A model as one block, in float32, which never makes all the logits at once where its output head is plain.

    Raises:
        LoptError: the model cannot be read, or is of a class that is not trained here.
    """
    (block,) = load_blocks(config, [])
    return block


def load_blocks(config: ModelConfig, boundaries: Sequence[int]) -> list[BlockModel]:
    """The same as several blocks, cut before each of the layers `boundaries`."""
    said = load_model_config(config)
    weights = PretrainedWeights(config.model_name_or_path, config.model_revision)
    model_config = without_quantization(said, config.model_name_or_path, weights)
    model_class = model_class_of(model_config, config.trust_remote_code)
    specs = split_at(boundaries, model_config.num_hidden_layers)
    builder = BlockBuilder(model_class, model_config, check_split(model_class, model_config, specs))
    warn_of_unused(builder.unused_tensors(weights), config.model_name_or_path)
    return [builder.from_pretrained(spec, weights).eval() for spec in specs]


def loss_on(block: BlockModel, objective: Objective, rows: TokenizedRows, device: torch.device, what: str) -> Score:
    """The mean of the task's loss of a whole model over the target tokens of rows, in nats; a row is an item.

    Args:
        block: the model, on `device`.
        objective: the task's loss.
        rows: to measure.
        device: to measure on.
        what: for the progress bar.
    """

    def loss(batch: Microbatch) -> tuple[torch.Tensor]:
        output = block(input_ids=batch.input_ids, logits_to_keep=batch.target_positions, leave_logits=True)
        return (objective(output, batch),)

    (score,) = means_over_targets(loss, rows, device, what)
    return score


def compare_on(
    base: BlockModel, block: BlockModel, rows: TokenizedRows, device: torch.device, what: str
) -> tuple[Score, Score]:
    """The loss of a model as `loss_on` has it, and how far its predictions are from another's.

    The latter is the mean Kullback-Leibler divergence KL(base || model) of the next-token distribution over the places
    of the target tokens, in nats. Unlike the loss it sees every change of the predictions, also where the text's own
    tokens became likelier.

    Args:
        base: the model that the other was made from, on `device`.
        block: the other.
        rows: to measure.
        device: to measure on.
        what: for the progress bar.
    """

    def loss_and_divergence(batch: Microbatch) -> tuple[torch.Tensor, torch.Tensor]:
        targets = batch.labels[:, 1:][:, batch.target_positions]
        has_target = targets != IGNORE_INDEX
        old, new = (
            F.log_softmax(
                model(input_ids=batch.input_ids, logits_to_keep=batch.target_positions).logits[has_target].float(), -1
            )
            for model in (base, block)
        )
        loss = F.nll_loss(new, targets[has_target], reduction="sum")
        return loss, F.kl_div(new, old, reduction="sum", log_target=True)

    loss, divergence = means_over_targets(loss_and_divergence, rows, device, what)
    return loss, divergence


def single_rows(rows: TokenizedRows, device: torch.device) -> Iterator[Microbatch]:
    """A row at a time: nothing is padded, and each row's own figures tell how sure a mean over them is.

    Each is the microbatch of a step of its own: its `step` is the row's number.
    """
    sampler = MicrobatchSampler(
        rows, per_device_train_batch_size=1, gradient_accumulation_steps=1, shuffle=False, seed=0, pad_token_id=0
    )
    for number in range(len(rows)):
        for batch in sampler.microbatches(number):
            yield batch.to(device)


@torch.no_grad()
def means_over_targets(
    of_row: Callable[[Microbatch], tuple[torch.Tensor, ...]], rows: TokenizedRows, device: torch.device, what: str
) -> list[Score]:
    """Means over the target tokens of rows, of figures that are summed over a row's.

    Args:
        of_row: gives the sums, scalars, of a row.
        rows: to measure.
        device: to measure on.
        what: for the progress bar.
    """
    sums, counts = [], []
    for batch in tqdm(single_rows(rows, device), desc=what, total=len(rows), disable=None, leave=False):
        sums.append(torch.stack(of_row(batch)))
        counts.append(batch.num_targets)
    weights = np.array(counts, dtype=np.float64)
    return [Score.of_items(items, weights) for items in torch.stack(sums, dim=1).double().cpu().numpy()]
