"""Measures finished models on files of rows."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from lopt_pp.config.data import DataConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.truncation import TruncationMode
from lopt_pp.data import RowLimits, TokenizedRows, load_rows
from lopt_pp.errors import renamed_in_errors
from lopt_pp.evaluation.losses import compare_on, load_whole, loss_on
from lopt_pp.evaluation.scores import Measure, Score, perplexity
from lopt_pp.model.block import BlockModel
from lopt_pp.model.dtypes import cast_parameters
from lopt_pp.model.pretrained import load_tokenizer
from lopt_pp.model.verify_positions import row_limits
from lopt_pp.objectives import ObjectiveConfig, task_objective


@dataclass(frozen=True)
class EvalFile:
    """Rows of a file that models are measured on.

    Attributes:
        kind: `task` for rows of what was trained on, `general` for rows of what is to be kept.
        flag: that names the file, for error messages.
        path: of the file.
        max_length: longest row in tokens.
        truncation_mode: how longer rows are cut; None where they are left out.
        limit: number of rows, the first ones, or a share of them below 1; None for all.
    """

    kind: Literal["task", "general"]
    flag: str
    path: str
    max_length: int
    truncation_mode: TruncationMode | None = None
    limit: float | None = None

    def load(self, tokenizer: PreTrainedTokenizerBase, block: BlockModel) -> TokenizedRows:
        """The rows, as a model's tokenizer encodes them.

        Args:
            tokenizer: of the model.
            block: the whole model.

        Raises:
            LoptError: the file cannot be read, has no usable row, or one that the model cannot take.
        """
        limits = RowLimits(*row_limits(block.model, self.max_length))
        config = DataConfig([self.path], max_length=self.max_length, truncation_mode=self.truncation_mode)
        with renamed_in_errors("--train_file", self.flag):
            rows = load_rows(config, tokenizer, limits)
        assert isinstance(rows, TokenizedRows)
        if self.limit is None:
            return rows
        number = int(self.limit) if self.limit >= 1 else max(1, round(self.limit * len(rows)))
        return rows.select(np.arange(min(number, len(rows))), "beyond --limit")


def open_model(
    path: str, name: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[BlockModel, PreTrainedTokenizerBase]:
    """A whole model on a device, and its tokenizer.

    Args:
        path: directory or hub id of the model.
        name: that the user has given it, for error messages.
        device: to hold it on.
        dtype: to hold it in.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        LoptError: the model cannot be read, or is of a class that is not trained here.
    """
    with renamed_in_errors("--model_name_or_path ", ""), renamed_in_errors(path, name):
        config = ModelConfig(path, trust_remote_code=trust_remote_code)
        whole = load_whole(config)
        cast_parameters(whole, device, dtype)
        return whole, load_tokenizer(config)


def measure_on(
    file: EvalFile,
    block: BlockModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    name: str,
    base: BlockModel | None,
) -> dict[Measure, Score]:
    """Loss and perplexity of a model on a file; of kind `general` also how far its predictions are from `base`'s.

    Args:
        file: to measure on.
        block: the whole model, on `device`.
        tokenizer: of the model.
        device: to measure on.
        name: of the model, for the progress bar.
        base: the model before training, on `device`; None where the divergence from it is not wanted.

    Raises:
        LoptError: the file cannot be read, or has no usable row.
    """
    rows = file.load(tokenizer, block)
    what, moved = f"{name} on {file.path}", None
    if base is not None and file.kind == "general":
        loss, moved = compare_on(base, block, rows, device, what)
    else:
        loss = loss_on(block, task_objective(ObjectiveConfig()), rows, device, what)
    scores = {
        Measure(file.kind, file.path, "loss", False): loss,
        Measure(file.kind, file.path, "perplexity", False): Score(perplexity(loss.value)),
    }
    if moved is not None:
        scores[Measure(file.kind, file.path, "KL from before", False)] = moved
    return scores
