"""End to end in one process, a run trains as TRL's SFTTrainer does: on the same batches the losses are the same."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from launching import train
from results import load_model, weights
from tiny import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from lopt_pp import Trainer

STEPS, BATCH, RATE = 20, 4, 1e-2

METRICS = ("mean_token_accuracy", "entropy")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose embeddings are tied, and rows as TRL reads them."""
    folder = tmp_path_factory.mktemp("trl")
    write_model(folder / "model", tie_word_embeddings=True)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what is {number} + {number % 7}?"}],
            "completion": [{"role": "assistant", "content": str(number + number % 7)}],
        }
        for number in range(STEPS * BATCH // 2)  # Two epochs.
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def logs_of(kind: type[SFTTrainer] | type[Trainer], files: Path, output: Path) -> list[dict[str, float]]:
    """Those of the steps of a trainer. Both are given the same arguments, but that ours is to train end to end."""
    set_seed(0)
    rows = datasets.Dataset.from_list([json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()])
    args = SFTConfig(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    if kind is Trainer:
        args.method = "e2e"  # type: ignore[attr-defined]
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(files / "model"),
        train_dataset=rows,
        args=args,
    )
    trainer.train()
    trainer.save_model(str(output))
    return [record for record in trainer.state.log_history if "loss" in record]


@pytest.mark.slow
def test_the_losses_are_those_of_trl(files: Path, tmp_path: Path) -> None:
    by_trl = logs_of(SFTTrainer, files, tmp_path / "trl")
    expected = [record["loss"] for record in by_trl]
    given = (
        f"--model_name_or_path {files / 'model'} --train_file {files / 'rows.jsonl'} --output_dir {tmp_path / 'out'}"
    )
    settings = f"--max_steps {STEPS} --per_device_train_batch_size {BATCH} --learning_rate {RATE} --warmup_steps 3"
    more = "--method e2e --lr_scheduler_type linear --weight_decay 0.1 --max_grad_norm 0.5 --shuffle_dataset false"
    result = train(
        1, *given.split(), *settings.split(), *more.split(), "--save_steps", "0", "--train_metrics", *METRICS
    )
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0], "it has hardly learned: nothing would be shown"
    assert losses == pytest.approx(expected, rel=1e-5)
    # A script for the one runs with the other, whose run is that of the flags.
    by_script = logs_of(Trainer, files, tmp_path / "script")
    assert [record["loss"] for record in by_script] == losses
    # What TRL logs besides: always the tokens so far, and what is asked for of single tokens.
    assert [record["num_tokens"] for record in by_script] == [record["num_tokens"] for record in by_trl]
    for name in METRICS:
        assert [record[name] for record in records] == pytest.approx([record[name] for record in by_trl], rel=1e-4)
        assert name not in by_script[0]
    script, flags = weights(tmp_path / "script"), weights(tmp_path / "out")
    assert script.keys() == flags.keys() and all(torch.equal(flags[name], script[name]) for name in script)
    # The result is tied as TRL's is, and close to it, weight by weight.
    own, other = weights(tmp_path / "out"), weights(tmp_path / "trl")
    assert own.keys() == other.keys() and "lm_head.weight" not in own
    assert all((own[name] - other[name]).abs().max() < 1e-3 for name in own)
    assert load_model(tmp_path / "out").config.tie_word_embeddings
    assert "The input and output embeddings are one tensor." in (tmp_path / "out" / "README.md").read_text()
