"""Runs that are measured on held-out rows."""

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from finishing import waiting_to_be_heard
from own_metrics import totals
from ranks import to_the_end
from tiny import write_inputs, write_rows
from torch.distributions import Categorical
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, EvalPrediction

from lopt_pp.config.parser import parse_config
from lopt_pp.data import DataConfig, TokenizedRows, load_rows
from lopt_pp.distributed.world import connect
from lopt_pp.training.run import run as run_training

STEPS = 6
COMMON = f"--max_steps {STEPS} --per_device_train_batch_size 3 --gradient_accumulation_steps 2 --learning_rate 1e-3"
LAYOUTS = {
    "one process": (1, "--num_stages 2"),
    "two processes": (2, "--num_stages 2"),
    "three stages on two": (2, "--num_stages 3 --queue_depth 1 --probe_steps 2"),
    "checkpointed bfloat16": (2, "--dtype bfloat16 --gradient_checkpointing true"),
    "frozen": (2, "--method frozen"),
    "auxiliary network": (2, "--local_objective next_token --auxiliary_layers 1 --local_head_warmup_steps 3"),
    "replicas": (2, "--data_parallel 2 --pipeline_processes 1"),
    "sharded": (2, "--data_parallel 2 --pipeline_processes 1 --sharding full"),
    "end to end": (2, "--method e2e"),
    "end to end, one process": (1, "--method e2e"),
}
"""Processes and flags, by name."""

HEARD_AT = 7
"""After this step runs wait until they know that they stop early; their evaluations are over that say so."""

MEASURED = "--eval_steps 2 --per_device_eval_batch_size 4"


def write_files(folder: Path) -> None:
    """A model with dropout, rows to train on, and two kinds of rows to measure."""
    write_inputs(folder, rows=37, tie_word_embeddings=True, attention_dropout=0.1)
    # The last microbatch of 13 rows has one; of two replicas, one has no rows left.
    write_rows(folder / "held_out.jsonl", number=13, seed=9)
    write_odd_rows(folder / "odd.jsonl")


def write_odd_rows(path: Path) -> Path:
    """Rows whose only target is a token that is never one in training: the more is learned, the worse."""
    z = 29
    rows = [{"input_ids": [1, 5, 6 + number, z], "labels": [-100, -100, -100, z]} for number in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(files: Path, out: Path, more: str) -> list[str]:
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {out}"
    return f"{given} {COMMON} {more}".split()


def train(arguments: list[str]) -> None:
    """A run in this process."""
    config = parse_config(arguments)
    with connect(config.pipeline) as world:
        assert run_training(config, world)


def train_layouts(
    folder: Path, layouts: Mapping[str, tuple[int, str]], kinds: Callable[[str], Mapping[str, str]]
) -> None:
    """Runs of every layout and kind, into directories that `run_of` names; those in two processes share their start.

    Args:
        folder: of `write_files`.
        layouts: processes and flags, by name.
        kinds: more flags, by kind, of a layout.
    """
    cases: list[dict[str, Any]] = []
    for layout, (processes, layout_flags) in layouts.items():
        for kind, more in kinds(layout).items():
            given = flags(folder, run_of(folder, kind, layout), f"{layout_flags} {more}")
            stops = "--early_stopping_patience" in given
            if processes > 1:
                cases.append({"name": f"{layout}, {kind}", "flags": given} | ({"heard_at": HEARD_AT} if stops else {}))
            else:
                with waiting_to_be_heard(HEARD_AT) if stops else nullcontext():
                    train(given)
    (folder / "cases.json").write_text(json.dumps(cases))
    to_the_end(folder / "log", 2, [str(folder / "cases.json")], module="worker")


def run_of(folder: Path, kind: str, layout: str) -> Path:
    return folder / kind / layout.replace(" ", "-")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first and first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def eval_losses(directory: Path) -> dict[int, float]:
    return {record["step"]: record["eval_loss"] for record in records(directory) if "eval_loss" in record}


def plain_rows(model_path: Path, rows_path: Path) -> TokenizedRows:
    rows = load_rows(DataConfig(train_file=[str(rows_path)]), AutoTokenizer.from_pretrained(model_path))
    assert isinstance(rows, TokenizedRows)
    return rows


def plain_loss(model_path: Path, rows_path: Path) -> float:
    """The mean loss of the whole model over the answers' tokens, row by row."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    rows, total, count = plain_rows(model_path, rows_path), 0.0, 0
    with torch.no_grad():
        for row in (rows[number] for number in range(len(rows))):
            labels = torch.tensor(row.labels[1:])
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            total += F.cross_entropy(logits, labels, reduction="sum").item()
            count += int((labels != -100).sum())
    return total / count


def plain_metrics(model_path: Path, rows_path: Path) -> tuple[dict[str, float], int]:
    """The mean entropy of the whole model's predictions, what `own_metrics.totals` makes of them, and the targets."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    rows = plain_rows(model_path, rows_path)
    shape = len(rows), int(rows.lengths.max())
    predictions, labels, losses, entropies = torch.full(shape, -100), torch.full(shape, -100), torch.zeros(shape), []
    with torch.no_grad():
        for number in range(len(rows)):
            row = rows[number]
            logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
            own = torch.tensor(row.labels)
            labels[number, : len(own)] = own
            (places,) = torch.where(own[1:] != -100)
            predictions[number, places] = logits[places].argmax(-1)
            losses[number, places] = F.cross_entropy(logits[places], own[places + 1], reduction="none")
            entropies.append(Categorical(logits=logits[places]).entropy())
    prediction = EvalPrediction(predictions.numpy(), labels.numpy())
    prediction.losses = losses.numpy()
    entropy = torch.cat(entropies)
    return {"entropy": entropy.mean().item(), **totals(prediction)}, len(entropy)
