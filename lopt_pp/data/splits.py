"""Reads the rows to train on, and those that are held out."""

import dataclasses
from datetime import date

import torch
from transformers import PreTrainedTokenizerBase

from lopt_pp.config.data import DataConfig
from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.data import Rows, TokenizedRows, load_rows
from lopt_pp.data.dataset import NoUsableRowsError
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.data.in_memory import NO_GIVEN_ROWS, TRAIN, GivenRows, GivenSource
from lopt_pp.data.limits import RowLimits
from lopt_pp.data.loading import load_unpacked, packed, to_evaluate_on
from lopt_pp.errors import LoptError, renamed_in_errors
from lopt_pp.util.seeds import derive_seed


def load_split(
    config: EvaluationConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    limits: RowLimits | None = None,
    day: date | None = None,
    given: GivenRows = NO_GIVEN_ROWS,
) -> tuple[Rows, EvaluationSets | None]:
    """Reads the rows to train on, and those to evaluate on; None where a run is not evaluated.

    The latter are neither packed nor streamed: each counts, and they are few. They are split where the others are.

    Args:
        config: of the evaluation.
        data: of the training rows; those of a file or a split are read in the same way.
        tokenizer: of the model.
        seed: that draws the rows which `eval_split_size` holds out.
        limits: what the model can take of a row.
        day: that the chat template prints, if it prints one; None is today.
        given: rows of a script, in place of those that flags name.

    Raises:
        LoptError: rows cannot be read, none of them can be used, or nothing would be left to train on.
    """
    while True:
        try:
            found = _load_split(config, data, tokenizer, seed, limits, day, given.as_read())
        except NoUsableRowsError as error:
            if error.source != TRAIN or not given.read_for(0, str(error)):
                raise
            continue
        if not given.read_for(len(found[0])):
            return found


def _load_split(
    config: EvaluationConfig,
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    limits: RowLimits | None,
    day: date | None,
    given: GivenRows,
) -> tuple[Rows, EvaluationSets | None]:
    plain = dataclasses.replace(data, streaming=False)
    if (size := config.eval_split_size) is not None:
        if data.streaming:
            raise LoptError(
                "--eval_split_size must know which rows can be used, as --streaming does not; give --eval_file"
            )
        if any(entry.repeats is not None for entry in data.mixture):
            raise LoptError(
                "--eval_split_size would hold out rows of --datasets that are trained on where they are repeated; give "
                "--eval_file"
            )
        kept, held = _draw(load_unpacked(plain, tokenizer, limits, day, given.source(given.train), seed), size, seed)
        return packed(kept, data, seed), EvaluationSets({"": to_evaluate_on(held, data)})
    rows = load_rows(data, tokenizer, limits, day, seed, given.source(given.train))
    if given.held_out:
        sets = {name: _load(plain, tokenizer, limits, day, given.source(raw)) for name, raw in given.held_out.items()}
        return rows, EvaluationSets(sets)
    if config.eval_file is not None:
        sets = {}
        for name, path in config.eval_files.items():
            source = dataclasses.replace(
                plain, train_file=[path], dataset_name=None, dataset_config=None, datasets=None
            )
            with renamed_in_errors("--train_file", "--eval_file"):
                sets[name] = _load(source, tokenizer, limits, day, given.source())
        return rows, EvaluationSets(sets)
    if config.dataset_test_split is not None:
        if data.dataset_name is None:
            raise LoptError(f"--dataset_test_split {config.dataset_test_split} is a split of --dataset_name; give that")
        with renamed_in_errors("--dataset_split", "--dataset_test_split"):
            split = dataclasses.replace(plain, dataset_split=config.dataset_test_split)
            return rows, EvaluationSets({"": _load(split, tokenizer, limits, day, given.source())})
    return rows, None


def _load(
    plain: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: RowLimits | None,
    day: date | None,
    given: GivenSource,
) -> TokenizedRows:
    return to_evaluate_on(load_unpacked(plain, tokenizer, limits, day, given), plain)


def _draw(rows: TokenizedRows, size: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """The rows to train on and those that are held out, each in the order of the data."""
    number = int(size) if size >= 1 else round(size * len(rows))
    if not 1 <= number < len(rows):
        raise LoptError(
            f"--eval_split_size {size:g} holds {number} of the {len(rows)} usable rows of {rows.source} out; hold 1 or "
            f"more out, and leave some to train on"
        )
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive_seed(seed)))
    held, kept = (part.sort().values.numpy() for part in (drawn[:number], drawn[number:]))
    return rows.select(kept, "held out by --eval_split_size"), rows.select(held, "to train on")
