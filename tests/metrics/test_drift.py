"""The drift of the boundaries: measured right, and without a trace in what is learned."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ranks
from results import weights
from tiny import InputsWith, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt_pp.data import DataConfig, MicrobatchSampler, load_rows
from lopt_pp.metrics.drift import Probe, drift
from lopt_pp.training.phases import DriftProbe
from lopt_pp.training.step_plan import StepPlan

STEPS = 4
COMMON = f"--max_steps {STEPS} --per_device_train_batch_size 3 --learning_rate 1e-3 --save_steps 2"


@pytest.fixture(scope="module")
def files(inputs_with: InputsWith) -> Path:
    return inputs_with(rows=37, tie_word_embeddings=True, attention_dropout=0.2)


def train(files: Path, out: Path, processes: int, flags: str) -> list[dict[str, Any]]:
    """The records of a run."""
    given = f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {out / 'out'}"
    arguments = [*given.split(), *COMMON.split(), *flags.split()]
    with ranks(out, *[arguments] * processes) as started:
        for rank in started:
            assert rank.status(120) == 0, rank.text
    return [json.loads(line) for line in (out / "out" / "metrics.jsonl").read_text().splitlines()]


def drifts(records: list[dict[str, Any]]) -> dict[tuple[int, int], tuple[float, float]]:
    return {(r["step"], r["stage"]): (r["drift_norm"], r["drift_cosine"]) for r in records if "drift_norm" in r}


LAYOUTS = {
    "4 stages": (4, "--num_stages 4 --queue_depth 5 --gradient_accumulation_steps 2"),
    "bfloat16": (2, "--num_stages 3 --dtype bfloat16"),
    "sharded replicas": (2, "--num_stages 3 --data_parallel 2 --pipeline_processes 1 --sharding full"),
    "replicas": (4, "--num_stages 2 --data_parallel 2"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_changes_nothing(layout: str, files: Path, tmp_path: Path) -> None:
    """Measuring after every step or never: the same weights, bit for bit, and the same losses."""
    processes, flags = LAYOUTS[layout]
    without = train(files, tmp_path / "without", processes, f"{flags} --probe_steps 0")
    records = train(files, tmp_path / "with", processes, f"{flags} --probe_steps 1")
    first, second = weights(tmp_path / "without" / "out"), weights(tmp_path / "with" / "out")
    assert first and first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for name in ("loss", "reconstruction_loss", "grad_norm"):
        assert [r.get(name) for r in records] == [r.get(name) for r in without]
    num_stages = records[-1]["stage"] + 1
    assert list(drifts(records)) == [(s, k) for s in range(1, STEPS + 1) for k in range(num_stages - 1)]
    assert not drifts(without)
    for norm, cosine in drifts(records).values():
        assert 1e-5 < norm < 10 and -1 < cosine < 1.00001


def test_processes_measure_what_one_does(files: Path, tmp_path: Path) -> None:
    flags = "--num_stages 4 --probe_steps 2"
    alone = drifts(train(files, tmp_path / "1", 1, flags))
    assert alone == drifts(train(files, tmp_path / "3", 3, flags))
    assert [step for step, stage in alone if stage == 0] == [2, 4]


def test_it_is_the_drift_of_the_hidden_states(files: Path, tmp_path: Path) -> None:
    """Against the hidden states of the whole models, before and after, by `transformers`; the first two boundaries."""
    records = train(files, tmp_path, 3, f"--num_stages 4 --pipeline_processes 3 --probe_steps {STEPS}")
    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    sampler = MicrobatchSampler(
        load_rows(DataConfig(train_file=[str(files / "rows.jsonl")]), tokenizer),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=1,
        shuffle=True,
        seed=42,
        pad_token_id=0,
    )
    batch, seen = sampler.microbatches(0)[0], []
    for path in (files / "model", tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            rows = [
                model(row[mask][None], output_hidden_states=True).hidden_states
                for row, mask in zip(batch.input_ids, batch.token_mask, strict=True)
            ]
        seen.append([torch.cat([states[layer][0] for states in rows]) for layer in (1, 2)])
    for boundary, (then, now) in enumerate(zip(*seen, strict=True)):
        norm, cosine = drifts(records)[STEPS, boundary]
        distance = ((now - then).norm(dim=-1) / then.norm(dim=-1)).mean()
        assert norm == pytest.approx(distance.item(), rel=1e-4)
        assert cosine == pytest.approx(torch.cosine_similarity(now, then, dim=-1).mean().item(), abs=1e-5)


@pytest.mark.slow
def test_a_resumed_run_compares_with_the_pretrained_model(files: Path, tmp_path: Path) -> None:
    whole = drifts(train(files, tmp_path / "whole", 1, "--probe_steps 2"))
    more = f"--probe_steps 2 --resume_from_checkpoint {tmp_path / 'whole' / 'out' / 'checkpoint-2'}"
    assert drifts(train(files, tmp_path / "resumed", 1, more)) == {
        place: value for place, value in whole.items() if place[0] > 2
    }


def test_a_stage_that_has_drifted_too_far_stops_learning(files: Path, tmp_path: Path) -> None:
    """After the same step in every layout, and for the rest of the run, past a checkpoint too."""
    flags = "--num_stages 2 --probe_steps 1 --max_interface_drift 1e-5"
    records = train(files, tmp_path / "2", 2, flags)
    first = [record for record in records if record["stage"] == 0]
    assert ["reconstruction_loss" in record for record in first] == [True, False, False, False]
    assert len({record["drift_norm"] for record in first}) == 1 and first[0]["drift_norm"] > 1e-5
    log = (tmp_path / "2" / "rank-0.log").read_text()
    assert log.count("stage 0 has stopped learning after step 1: its boundary's drift is") == 1
    losses = [record["loss"] for record in records if record["stage"] == 1]
    assert len(set(losses)) == STEPS
    expected = weights(tmp_path / "2" / "out")
    train(files, tmp_path / "1", 1, flags)
    checkpoint = tmp_path / "2" / "out" / "checkpoint-2"
    train(files, tmp_path / "resumed", 2, f"{flags} --resume_from_checkpoint {checkpoint}")
    for sharding in ("none", "full"):  # Replicas stop together.
        replicas = f"{flags} --data_parallel 2 --pipeline_processes 1 --sharding {sharding}"
        shared = train(files, tmp_path / sharding, 2, replicas)
        assert ["reconstruction_loss" in r for r in shared if r["stage"] == 0] == [True, False, False, False]
    for other in ("1", "resumed"):
        got = weights(tmp_path / other / "out")
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def test_nothing_is_measured_where_nothing_drifts(files: Path, tmp_path: Path) -> None:
    assert not drifts(train(files, tmp_path, 1, "--local_objective none --probe_steps 1"))


def test_drift_of_known_vectors() -> None:
    """One token turned by a right angle, one doubled, one padded."""
    then = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    now = torch.tensor([[[0.0, 3.0], [0.0, 2.0], [9.0, 9.0]]])
    record = drift(now, then, torch.tensor([[True, True, False]]))
    assert record["drift_norm"] == pytest.approx((math.sqrt(2) + 1) / 2)
    assert record["drift_cosine"] == pytest.approx(0.5)


def test_a_probe_is_small(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(9):
            file.write(json.dumps({"question": "what " * (10 + 30 * number), "answer": "1"}) + "\n")
    rows = load_rows(DataConfig(train_file=[str(tmp_path / "rows.jsonl")]), AutoTokenizer.from_pretrained(model))
    sampler = MicrobatchSampler(
        rows,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        shuffle=False,
        seed=0,
        pad_token_id=0,
    )
    probe = Probe(sampler, every=10, num_stages=4)
    plan = StepPlan(sampler, [DriftProbe(probe, limit=1.0)])
    crossing = [[phase.shapes(9, boundary) for phase in plan.phases(9)] for boundary in range(3)]
    assert crossing == [[[(4, 128)]], [[(4, 128)]], [[]]]
    assert not list(plan.phases(8)) and not list(plan.phases(10))
