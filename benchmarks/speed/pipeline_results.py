"""What comes out of the pipeline benchmark: its measurements, the figures made of them, and how they are shown."""

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from benchmarks.helpers.machine import describe_machine
from benchmarks.helpers.synthetic import FORMATS
from benchmarks.speed.methods import METHODS
from benchmarks.speed.shared_model import PROCESSES, Cut

EFFICIENCY = 0.97
OF_IDEAL = 0.97
OVER_ZERO_BUBBLE = 1.0
OVER_NAIVE = 1.9


@dataclass(frozen=True)
class Computed:
    """What the busiest stage computes, without communication, in seconds."""

    microbatch: float
    optimizer: float

    def step(self, microbatches: int) -> float:
        return microbatches * self.microbatch + self.optimizer


@dataclass
class Cell:
    """The measurements of one model with so many microbatches per step, one entry per round.

    Attributes:
        seconds: of a step, by method.
        computing: of the busiest stage of local learning, both stages at work.
    """

    model: str
    microbatches: int
    seconds: dict[str, list[float]] = field(default_factory=dict)
    computing: list[Computed] = field(default_factory=list)


@dataclass(frozen=True)
class Figure:
    """A figure that is to be reached."""

    model: str
    microbatches: int
    name: str
    value: float
    at_least: float
    ideal: float | None = None

    @property
    def reached(self) -> bool:
        return self.value >= self.at_least


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median over the rounds of the ratio within a round."""
    return median(a / b for a, b in zip(numerators, denominators, strict=True))


def figures_of(cell: Cell) -> list[Figure]:
    """The figures to reach that the measured methods allow."""
    own, microbatches = cell.seconds["lopt"], cell.microbatches

    def figure(name: str, value: float, at_least: float, ideal: float | None = None) -> Figure:
        return Figure(cell.model, microbatches, name, value, at_least, ideal)

    computing = [computed.step(microbatches) for computed in cell.computing]
    figures = [figure("efficiency", ratio(computing, own), EFFICIENCY)]
    if "1f1b" in cell.seconds:
        waiting = [computed.step(microbatches + PROCESSES - 1) for computed in cell.computing]
        ideal = ratio(waiting, computing)
        figures.append(figure("over 1F1B", ratio(cell.seconds["1f1b"], own), OF_IDEAL * ideal, ideal))
    for name, at_least in (("zero_bubble", OVER_ZERO_BUBBLE), ("zbv", OVER_ZERO_BUBBLE), ("naive", OVER_NAIVE)):
        if name in cell.seconds:
            figures.append(figure(f"over {METHODS[name].label}", ratio(cell.seconds[name], own), at_least))
    return figures


def tokens_per_second(cell: Cell) -> dict[str, float]:
    """By method."""
    shape = FORMATS[cell.model]
    tokens = cell.microbatches * shape.rows * shape.tokens
    return {name: tokens / median(seconds) for name, seconds in cell.seconds.items()}


def report(
    cells: Sequence[Cell], cuts: Mapping[str, Mapping[str, Cut]], slowdowns: Mapping[str, Sequence[float]]
) -> list[str]:
    """The lines for the screen."""
    names = list(cells[0].seconds)
    lines = [f"{'tokens per second':<20}" + f"{'M':>3}" + "".join(f"{METHODS[name].label:>12}" for name in names)]
    for cell in cells:
        speed = tokens_per_second(cell)
        lines.append(f"{cell.model:<20}{cell.microbatches:>3}" + "".join(f"{speed[name]:>12.1f}" for name in names))
    lines.append(f"{'first layers':<20}")
    for model, own in cuts.items():
        lines.append(f"{model:<23}" + "".join(f"{','.join(map(str, own[name])) or '-':>12}" for name in names))
    for model, values in slowdowns.items():
        lines.append(f"{model}: a stage computes {median(values):.2f} times as long while the other works as alone")
    lines.append(f"{'figure':<20}{'M':>3}  {'':<18}{'value':>8}{'at least':>10}{'ideal':>8}")
    for cell in cells:
        for figure in figures_of(cell):
            lines.append(
                f"{figure.model:<20}{figure.microbatches:>3}  {figure.name:<18}{figure.value:>8.3f}"
                f"{figure.at_least:>10.3f}{figure.ideal or math.nan:>8.3f}  "
                f"{'reached' if figure.reached else 'not reached'}"
            )
    return lines


def result_of(
    cells: Sequence[Cell],
    cuts: Mapping[str, Mapping[str, Cut]],
    slowdowns: Mapping[str, Sequence[float]],
    device: torch.device,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Everything, as plain data."""
    settings = {**vars(arguments), "output": str(arguments.output)}
    return {
        "benchmark": "pipeline",
        "command": " ".join(["python", "-m", "benchmarks.speed.pipeline", *sys.argv[1:]]),
        "machine": describe_machine(device),
        "settings": settings,
        "shapes": {model: asdict(FORMATS[model]) for model in cuts},
        "cells": [
            asdict(cell)
            | {
                "cuts": cuts[cell.model],
                "tokens_per_second": tokens_per_second(cell),
                "over": {
                    name: ratio(seconds, cell.seconds["lopt"])
                    for name, seconds in cell.seconds.items()
                    if name != "lopt"
                },
            }
            for cell in cells
        ],
        "slowdown": dict(slowdowns),
        "figures": [asdict(figure) | {"reached": figure.reached} for cell in cells for figure in figures_of(cell)],
    }
