"""The runs of the trainer that several checks are made of, and what they leave."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lopt_pp.checks.result import CheckFailed, Figures
from lopt_pp.checks.session import Ran, Session
from lopt_pp.config.topology import Topology

STEPS = 6
TOLERANCE = 2e-5
"""Between weights of a run in float32 and of the same with its sums in another order; a wrong step makes 1e-3."""


def flags_of(session: Session, out: Path, topology: Topology, *more: str) -> list[str]:
    """The flags of a run on the inputs of the session.

    Args:
        session: where it runs.
        out: the output directory.
        topology: how it is laid out.
        more: flags; of two that are the same the later one counts.
    """
    inputs = session.folder / "inputs"
    flags = f"--backend {session.backend} --max_steps {STEPS} --per_device_train_batch_size 2 --save_steps 0"
    flags += " --learning_rate 1e-3 --adam_epsilon 1e-6"
    flags += f" --num_stages {topology.num_stages} --data_parallel {topology.num_replicas}"
    paths = {"model_name_or_path": inputs / "model", "train_file": inputs / "rows.jsonl", "output_dir": out}
    return [*(word for name, path in paths.items() for word in (f"--{name}", str(path))), *flags.split(), *more]


def train(session: Session, name: str, topology: Topology, *more: str, **options: Any) -> Ran:
    """A run in all processes; its output directory is `out` in its folder."""
    return session.run(name, flags_of(session, session.folder / name / "out", topology, *more), **options)


def train_alone(session: Session, topology: Topology, *more: str, accumulation: int = 1, name: str = "") -> Path:
    """The output directory of a run that does in one process what `topology` does in all; made once.

    Args:
        session: where it runs.
        topology: the layout that it is compared with.
        more: flags.
        accumulation: microbatches of a step in each replica.
        name: of the run; by default what tells it apart from others.
    """
    words = [str(topology.num_stages), str(topology.num_replicas * accumulation), *more]
    name = name or "alone-" + "-".join(word.strip("-") for word in words)
    out = session.folder / name / "out"
    if not session.leader_says(lambda: (out / "model.safetensors.index.json").exists()):
        whole, step = Topology(topology.num_stages, 1), str(topology.num_replicas * accumulation)
        flags = flags_of(session, out, whole, *more, "--gradient_accumulation_steps", step)
        session.run(name, flags, processes=1).succeeded()
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model."""
    files = sorted(out.glob("model*.safetensors"))
    if not files:
        raise CheckFailed(f"a run has left no model in {out}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def compare(one: Path, other: Path, atol: float = TOLERANCE) -> Figures:
    """How far two models are from each other.

    Raises:
        CheckFailed: further than `atol`, or one is not finite.
    """
    first, second = weights(one), weights(other)
    if first.keys() != second.keys():
        raise CheckFailed(f"the models have other tensors: {sorted(first.keys() ^ second.keys())}")
    if all(torch.equal(first[name], second[name]) for name in first):
        return {"weights": "bit for bit the same"}
    differences = {name: (first[name].float() - second[name].float()).abs().max().item() for name in first}
    name, worst = max(differences.items(), key=lambda item: math.inf if math.isnan(item[1]) else item[1])
    if not worst <= atol:
        raise CheckFailed(
            f"the weights differ by up to {worst:.2g} in {name} (at most {atol:g} is rounding). Do not train in this "
            f"layout; please report it with the file of --json"
        )
    return {"weights differ by at most": worst}


def records(out: Path) -> list[dict[str, Any]]:
    """What each stage has written of each step."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
