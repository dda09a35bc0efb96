"""The headline: the pipeline is the sequential algorithm, bit for bit, and the sequential algorithm is the method."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from ranks import to_the_end
from results import weights
from tiny import write_model, write_rows
from transformers import AutoConfig, AutoTokenizer

from lopt_pp.data import DataConfig, MicrobatchSampler, load_rows
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import split_evenly
from lopt_pp.model.pretrained import model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import ObjectiveConfig, Reconstruction, local_objective

STEPS = 6

WARMUP = ["--local_head_warmup_steps", "3", "--local_head_learning_rate", "3e-3"]

# Name, extra flags, and which stage is made slow by how much per microbatch.
CASES: dict[str, tuple[list[str], int | None]] = {
    "queue 1": (["--queue_depth", "1"], None),
    "queue 2, slow second stage": (["--queue_depth", "2"], 1),
    "queue 2, slow first stage": (["--queue_depth", "2"], 0),
    "queue 7, accumulation 3": (["--queue_depth", "7", "--gradient_accumulation_steps", "3"], 1),
    "queue longer than the run": (["--queue_depth", "50"], None),
    "bfloat16": (["--dtype", "bfloat16", "--gradient_accumulation_steps", "2"], None),
    "dropout": (["--model_name_or_path", "GPT2"], None),
    "4 stages": (["--num_stages", "4"], None),
    "one stage": (["--num_stages", "1"], None),
    "next token": (["--local_objective", "next_token", *WARMUP], 0),
    "next token, chosen layers": (["--local_objective", "next_token", "--auxiliary_choice", "2", *WARMUP], None),
    "next token, dropout": (["--local_objective", "next_token", "--model_name_or_path", "GPT2", *WARMUP], None),
    "next token, bfloat16, 4 stages": (
        ["--local_objective", "next_token", "--dtype", "bfloat16", "--num_stages", "4", "--train_embeddings", "false"]
        + ["--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2"],
        None,
    ),
    "next token, 2 of 3 microbatches": (
        ["--local_objective", "next_token", "--gradient_accumulation_steps", "3", "--local_accumulation_steps", "2"]
        + ["--auxiliary_choice", "all"],
        None,
    ),
    "own objective": (["--local_objective", "own_objective:TokenItself", "--queue_depth", "7", *WARMUP], 1),
    "none": (["--local_objective", "none", "--gradient_accumulation_steps", "2"], None),
}


def cases_for(processes: int, model: Path, gpt2: Path, rows: Path, out: Path) -> list[dict[str, Any]]:
    common = f"--model_name_or_path {model} --train_file {rows} --max_steps {STEPS} --per_device_train_batch_size 3"
    common += " --learning_rate 1e-3 --weight_decay 0.1 --warmup_steps 2 --lr_scheduler_type cosine --num_stages 2"
    cases = []
    for name, (flags, slow) in CASES.items():
        if name == "one stage" and processes > 1:
            continue
        flags = [str(gpt2) if flag == "GPT2" else flag for flag in flags]
        flags = [*common.split(), *flags, "--output_dir", str(out / str(processes) / name)]
        cases.append({"name": name, "flags": flags, "slow_stage": slow if processes > 1 else None, "seconds": 0.03})
    return cases


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases, once in two processes side by side and once in one process."""
    folder = tmp_path_factory.mktemp("runs")
    model = write_model(folder / "model", tie_word_embeddings=True)
    gpt2 = write_model(folder / "gpt2", family="gpt2", resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2)
    rows = write_rows(folder / "rows.jsonl")
    for processes in (2, 1):
        cases = folder / f"cases-{processes}.json"
        cases.write_text(json.dumps(cases_for(processes, model, gpt2, rows, folder)))
        to_the_end(folder / f"log-{processes}", processes, [str(cases)], module="worker")
    return folder


@pytest.mark.parametrize("case", [case for case in CASES if case != "one stage"])
def test_two_processes_equal_one(runs: Path, case: str) -> None:
    together, alone = weights(runs / "2" / case), weights(runs / "1" / case)
    assert together.keys() == alone.keys()
    assert all(torch.equal(together[name], alone[name]) for name in alone)
    start = weights(runs / ("gpt2" if "dropout" in case else "model"))
    assert alone.keys() - start.keys() <= {"lm_head.weight"}, "something that exists only in training was saved"
    moved = [name for name in alone if name in start and not torch.equal(start[name], alone[name])]
    assert any(".0." in name for name in moved) == (case != "none") and any(".3." in name for name in moved)
    embedding = "transformer.wte.weight" if "dropout" in case else "model.embed_tokens.weight"
    assert (embedding in moved) == (case not in ("none", "next token, bfloat16, 4 stages"))


def test_queue_depth_and_speed_change_nothing(runs: Path) -> None:
    first, *others = [weights(runs / "2" / case) for case in CASES if case.startswith("queue") and "accum" not in case]
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_metrics_agree(runs: Path) -> None:
    """Both layouts report the same losses, step by step and stage by stage."""

    def losses(processes: int) -> list[tuple]:
        lines = (runs / str(processes) / "queue 7, accumulation 3" / "metrics.jsonl").read_text().splitlines()
        records = map(json.loads, lines)
        return [(r["step"], r["stage"], r.get("loss"), r.get("reconstruction_loss"), r["grad_norm"]) for r in records]

    assert losses(2) == losses(1)
    assert [(step, stage) for step, stage, *_ in losses(2)] == [(s, k) for s in range(1, STEPS + 1) for k in (0, 1)]


def test_the_losses_have_their_names(runs: Path) -> None:
    names = {
        "next token": "auxiliary_loss",
        "own objective": "token_loss",
        "none": None,
        "queue 1": "reconstruction_loss",
    }
    for case, name in names.items():
        lines = (runs / "2" / case / "metrics.jsonl").read_text().splitlines()
        for record in map(json.loads, lines):
            losses = {key for key in record if key.endswith("loss")}
            assert losses == ({"loss"} if record["stage"] == 1 else {name} - {None})
        card = (runs / "2" / case / "README.md").read_text()
        story = {
            "auxiliary_loss": "auxiliary network",
            "token_loss": "telling its own tokens",
            None: "stayed as they were",
        }
        assert story.get(name, "reconstruction of its own input") in " ".join(card.split())


METHODS = {
    "reconstruction": None,
    "next_token --auxiliary_layers 1": 3,
    "next_token --auxiliary_choice 2": 2,
    "next_token --auxiliary_layers 1 --local_accumulation_steps 1": 3,
}
"""The flags of the objective, and the layer that its auxiliary network has."""

METHOD_STEPS, METHOD_SEED, EPSILON = 20, 5, 1e-6


def method_run(folder: Path, objective: str, accumulation: int) -> Path:
    return folder / f"{objective}, accumulation {accumulation}"


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every method's run in two processes."""
    folder = tmp_path_factory.mktemp("methods")
    write_model(folder / "model", tie_word_embeddings=True)
    write_rows(folder / "rows.jsonl", number=50)
    # Token by token labels, some rows with a single target: means of means would show.
    common = f"--model_name_or_path {folder / 'model'} --train_file {folder / 'rows.jsonl'} --max_steps {METHOD_STEPS}"
    common += " --per_device_train_batch_size 2 --learning_rate 1e-3 --local_learning_rate 3e-4 --weight_decay 0.05"
    common += f" --adam_epsilon {EPSILON} --max_grad_norm 0 --seed {METHOD_SEED} --reconstruction_weight 10"
    cases = []
    for accumulation in (1, 3):
        for objective in METHODS:
            flags = f"{common} --gradient_accumulation_steps {accumulation} --local_objective {objective}"
            out = method_run(folder, objective, accumulation)
            cases.append({"name": out.name, "flags": [*flags.split(), "--output_dir", str(out)]})
    (folder / "cases.json").write_text(json.dumps(cases))
    to_the_end(folder / "log", 2, [str(folder / "cases.json")], module="worker")
    return folder


@pytest.mark.parametrize("objective", METHODS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_method_in_plain_pytorch_gives_the_same_weights(methods: Path, accumulation: int, objective: str) -> None:
    model, rows_file = methods / "model", methods / "rows.jsonl"
    auxiliary_layer, steps, seed = METHODS[objective], METHOD_STEPS, METHOD_SEED
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = load_rows(DataConfig(train_file=[str(rows_file)]), tokenizer)
    sampler = MicrobatchSampler(
        rows,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        shuffle=True,
        seed=seed,
        pad_token_id=0,
    )
    plan = [reference.without_padding(sampler.microbatches(step)) for step in range(steps)]
    config = AutoConfig.from_pretrained(model)
    specs = split_evenly(config.num_hidden_layers, 2)
    builder = BlockBuilder(model_class_of(config), config, check_split(model_class_of(config), config, specs))
    block = builder.from_pretrained(specs[0], PretrainedWeights(str(model)))
    head = local_objective(block, ObjectiveConfig(), seed)
    assert isinstance(head, Reconstruction)
    expected = reference.train(
        str(model),
        [parameter.detach() for parameter in head.parameters()] if auxiliary_layer is None else None,
        plan,
        auxiliary_layer=auxiliary_layer,
        learned=1 if "accumulation" in objective else None,
        boundary=2,
        weight=10.0,
        rate=1e-3,
        head_rate=3e-4,
        weight_decay=0.05,
        epsilon=EPSILON,
    )
    start, trained = weights(model), weights(method_run(methods, objective, accumulation))
    assert trained.keys() == expected.keys()
    for name, tensor in expected.items():
        moved = (tensor - start.get(name, start["model.embed_tokens.weight"])).abs().max()
        assert moved > 1e-3, f"{name} has hardly moved: the comparison would prove nothing"
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=2e-5, msg=partial("{}: {}".format, name))


def test_one_activation_crosses_per_microbatch_and_nothing_comes_back(tmp_path: Path) -> None:
    """By the kernel's counters of the connections between the two processes, during a whole training."""
    rows = write_rows(tmp_path / "rows.jsonl")
    cases, sizes = [], (64, 256)
    for size in sizes:
        model = write_model(tmp_path / f"model-{size}", hidden_size=size)
        flags = f"--model_name_or_path {model} --train_file {rows} --max_steps 10 --per_device_train_batch_size 3"
        flags += f" --gradient_accumulation_steps 2 --output_dir {tmp_path / str(size)}"
        cases.append({"name": str(size), "flags": flags.split(), "count_bytes": True})
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    to_the_end(tmp_path / "log", 2, [str(tmp_path / "cases.json")], module="worker")

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model-64")
    sampler = MicrobatchSampler(
        load_rows(DataConfig(train_file=[str(rows)]), tokenizer),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        shuffle=True,
        seed=42,
        pad_token_id=0,
    )
    shapes = [shape for step in range(10) for shape in sampler.shapes(step)]
    backward = []
    for size in sizes:
        first, second = (json.loads((tmp_path / str(size) / f"bytes-{rank}.json").read_text()) for rank in (0, 1))
        payload = sum(rows * tokens for rows, tokens in shapes) * size * 4
        # A message is a header and a payload; gloo frames each, and announces it, in less than 100 bytes.
        framing = 500 * (len(shapes) + 2)
        assert payload <= second["received"] <= payload + framing
        assert first["received"] <= framing
        backward.append(first["received"])
    # Gloo tells a sender that a receive is posted, unless the sender was first: some tens of bytes for some messages.
    assert abs(backward[0] - backward[1]) <= 64 * (len(shapes) + 2), "what comes back grows with the hidden size"
