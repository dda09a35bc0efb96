"""The benchmark of unequal rows in one of its processes: the rows, the ways to train, and their trials in turn."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset
from transformers.utils import logging as transformers_logging

from benchmarks.helpers.synthetic import FORMATS, Format
from benchmarks.speed.local_learning import LocalLearning
from benchmarks.speed.methods import OneForwardOneBackward, OwnShapes
from benchmarks.speed.pipeline_process import seconds_per_step
from benchmarks.speed.shared_model import Cut, Method, SharedModel
from lopt_pp.data import MicrobatchSampler, TokenizedRows
from lopt_pp.data.dataset import Pack
from lopt_pp.data.formats import IGNORE_INDEX
from lopt_pp.data.packed_rows import PackedRows
from lopt_pp.distributed.world import World
from lopt_pp.objectives import ObjectiveConfig

MAX_LENGTH = 512
"""Of the rows, and of a pack of them."""

METHODS = ("own shapes", "alike", "reconstruction", "next_token", "frozen")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: of `FORMATS`.
        rows: of a microbatch that is not packed.
        microbatches: per step, one number after the other.
        packing: without, with, or one after the other.
        rounds: in which all methods take a turn.
        trial: microbatches of a turn, at least.
        learned: the share of a step's microbatches that the first half learns from by next_token.
        cut: the layer that the second half begins with, end to end and with reconstruction; None searches.
        output: a file that has what was measured so far.
    """

    model: str
    rows: int
    microbatches: tuple[int, ...]
    packing: tuple[bool, ...]
    rounds: int
    trial: int
    learned: float
    cut: int | None
    output: Path


class _Drawn:
    """Some rows, or packs of rows, in an order of their own: what a turn trains on."""

    rows_per_pack = 1

    def __init__(self, rows: TokenizedRows | PackedRows, numbers: np.ndarray) -> None:
        self._rows, self._numbers = rows, numbers
        self.source, self.digest = rows.source, rows.digest
        self.lengths = rows.lengths[numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def fetch(self, numbers: np.ndarray) -> list[Pack]:
        return self._rows.fetch(self._numbers[numbers])

    def prefetch(self, numbers: np.ndarray) -> None:
        """Nothing to do: they are in memory."""

    def left_out(self, numbers: np.ndarray) -> str:
        return ""

    def digest_without(self, numbers: Sequence[int]) -> str:
        return self.digest

    def summary(self) -> str:
        return self._rows.summary()


class UnequalRows(SharedModel):
    """The model with rows of unequal lengths.

    Attributes:
        packing: whether rows are packed.
        seed: which rows are drawn.
    """

    packing, seed = False, 0

    def __init__(self, world: World, group: dist.ProcessGroup, shape: Format) -> None:
        super().__init__(world, group, shape, torch.float32)
        self._rows = rows_of_gsm8k(self.config.vocab_size)
        self._packs = PackedRows(self._rows, MAX_LENGTH)

    def sampler(self, microbatches: int, steps: int, more: int = 0) -> MicrobatchSampler:
        rows, rows_per_batch = (self._packs, 1) if self.packing else (self._rows, self.shape.rows)
        order = np.random.default_rng(self.seed).permutation(len(rows))
        return MicrobatchSampler(
            _Drawn(rows, order[: rows_per_batch * (microbatches * steps + more)]),
            per_device_train_batch_size=rows_per_batch,
            gradient_accumulation_steps=microbatches,
            shuffle=False,
            seed=0,
            pad_token_id=0,
            keep_apart=self.packing,
        )

    def counts(self, microbatches: int, steps: int) -> dict[str, int]:
        """Tokens of so many steps: real ones, and those that are computed with own shapes and with padding alike."""
        sampler = self.sampler(microbatches, steps)
        shapes = [sampler.shapes(step) for step in range(steps)]
        return {
            "tokens": sum(sampler.counts(step).num_tokens for step in range(steps)),
            "own": sum(rows * tokens for step in shapes for rows, tokens in step),
            "alike": sum(len(step) * max(r for r, _ in step) * max(t for _, t in step) for step in shapes),
        }


def rows_of_gsm8k(vocabulary: int) -> TokenizedRows:
    """Random tokens in rows as long as GSM8K's; the answers' share of them has a loss."""
    lengths = json.loads((Path(__file__).parent / "gsm8k_lengths.json").read_text())["rows"]
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, vocabulary, length).tolist() for length, _ in lengths]
    columns = {
        "input_ids": ids,
        "labels": [
            [IGNORE_INDEX] * (len(own) - n) + own[len(own) - n :] for own, (_, n) in zip(ids, lengths, strict=True)
        ],
        "length": [length for length, _ in lengths],
        "num_targets": [targets for _, targets in lengths],
    }
    return TokenizedRows(Dataset.from_dict(columns), "lengths of GSM8K", {})


def work(world: World, settings: Settings) -> None:
    """All trials; every process must call this.

    Rank 0 writes the cuts and the cells of the table, with an entry per round in each list, after each of them: a run
    that is ended early has measured something.
    """
    transformers_logging.disable_progress_bar()
    group = dist.new_group(backend="gloo")
    shared = UnequalRows(world, group, replace(FORMATS[settings.model], rows=settings.rows))
    cuts = _cuts(shared, settings)
    cells = []
    for packing in settings.packing:
        for number in settings.microbatches:
            steps = -(-settings.trial // number)
            methods = {name: _make(name, shared, cuts[name], round(settings.learned * number)) for name in METHODS}
            cells.append((packing, number, steps, methods))
    results: list[dict[str, Any]] = [
        {"packing": packing, "microbatches": number, "steps": steps, "seconds": {name: [] for name in METHODS}}
        | {"tokens": [], "computed_own": [], "computed_alike": []}
        for packing, number, steps, _ in cells
    ]
    for turn in range(settings.rounds):
        for (packing, number, steps, methods), result in zip(cells, results, strict=True):
            shared.packing, shared.seed = packing, turn
            by = turn % len(METHODS)
            taken = {}
            for name in (*METHODS[by:], *METHODS[:by]):
                if turn == 0:
                    seconds_per_step(methods[name], 2, 1)  # Touches memory for the first time.
                taken[name] = steps * seconds_per_step(methods[name], number, steps)
            for name in METHODS:
                result["seconds"][name].append(taken[name])
            counts = shared.counts(number, steps)
            result["tokens"].append(counts["tokens"])
            for kind in ("own", "alike"):
                result[f"computed_{kind}"].append(counts[kind] / counts["tokens"])
            if world.rank == 0:
                print(f"round {turn + 1}: {'packed, ' if packing else ''}{number} microbatches", file=sys.stderr)
                settings.output.write_text(json.dumps({"cuts": cuts, "cells": [r for r in results if r["tokens"]]}))


def _make(name: str, shared: SharedModel, cut: Cut, learned: int) -> Method:
    """A method, for a cut and a number of microbatches of each step that the first half learns from by next_token."""
    if name == "own shapes":
        return OwnShapes(shared, cut)
    if name == "alike":
        return OneForwardOneBackward(shared, cut)
    objectives = {
        "frozen": ObjectiveConfig(method="frozen"),
        "reconstruction": ObjectiveConfig(),
        "next_token": ObjectiveConfig(
            local_objective="next_token", auxiliary_choice="all", local_accumulation_steps=max(learned, 1)
        ),
    }
    return LocalLearning(shared, cut, objectives[name])


def _cuts(shared: UnequalRows, settings: Settings) -> dict[str, Cut]:
    """Of end to end and reconstruction the shortest of three from the middle on; of the others the middle."""
    depth = shared.config.num_hidden_layers
    middle: Cut = (depth // 2,)
    cuts = dict.fromkeys(METHODS, middle)
    if settings.cut is not None:
        return cuts | dict.fromkeys(("own shapes", "alike", "reconstruction"), (settings.cut,))
    number = settings.microbatches[len(settings.microbatches) // 2 - 1]
    steps = -(-settings.trial // number)
    for name in ("own shapes", "reconstruction"):
        seconds: dict[Cut, float] = {}
        # The last half has the output head besides.
        for cut in ((layer,) for layer in range(depth // 2, min(depth // 2 + 3, depth))):
            method = _make(name, shared, cut, 1)
            seconds_per_step(method, number, 1)
            seconds[cut] = seconds_per_step(method, number, steps)
        cuts[name] = min(seconds, key=seconds.__getitem__)
    return cuts | {"alike": cuts["own shapes"]}
