"""A run that is given a model, a tokenizer and rows as objects is the run that flags and files make, bit for bit."""

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl
from datasets import Dataset, IterableDataset
from pandas import DataFrame
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
)

from lopt_pp import LoptError, RunError, Trainer, load_config

STEPS: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "save_steps": 2}


def rows_of(inputs: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (inputs / "rows.jsonl").read_text().splitlines()]


def text_of(row: dict[str, Any]) -> str:
    return f"{row['question']} {row['answer']}"


def same_weights(got: PreTrainedModel, expected: PreTrainedModel) -> bool:
    theirs = expected.state_dict()
    return got.state_dict().keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in got.state_dict().items()
    )


@pytest.fixture(scope="module")
def by_files(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """What flags and files give."""
    flags = {"model_name_or_path": inputs / "model", "train_file": inputs / "rows.jsonl", **STEPS}
    trainer = Trainer(load_config(flags, output_dir=tmp_path_factory.mktemp("by-files") / "out"))
    assert trainer.train()
    return trainer.model


def test_a_script_for_trl(inputs: Path, tmp_path: Path, by_files: PreTrainedModel) -> None:
    """With the import changed and the arguments as they are."""
    trainer = Trainer(
        model=str(inputs / "model"),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), bf16=False, use_cpu=True, **STEPS),
        train_dataset=Dataset.from_list(rows_of(inputs)),
    )
    assert trainer.train()
    assert same_weights(trainer.model, by_files)


def test_a_loaded_model_is_trained_in_place(inputs: Path, tmp_path: Path, by_files: PreTrainedModel) -> None:
    """As it is in memory; and a run goes on from its checkpoint with the rows in another form."""
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    model.name_or_path = "nowhere"  # Nothing is read from there.
    template = tokenizer.chat_template
    common: dict[str, Any] = {"processing_class": tokenizer, "eval_dataset": rows_of(inputs)[:3]}
    args = {"output_dir": tmp_path / "out", **STEPS, "max_steps": 2, "lr_scheduler_type": "constant"}
    untouched = copy.deepcopy(model)
    first = Trainer(model, args, train_dataset=IterableDataset.from_generator(rows_of, gen_kwargs={"inputs": inputs}))
    with pytest.raises(RunError, match="nowhere: there is no such directory, nor a model of this name"):
        first.train()
    assert same_weights(model, untouched)
    # A stream of which two steps need four rows would not be those rows: all are given.
    first = Trainer(model, args, train_dataset=Dataset.from_list(rows_of(inputs)), **common)
    assert first.train() and first.model is model
    assert not same_weights(model, untouched) and tokenizer.chat_template == template
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same_weights(model, saved)
    # The same rows as a list of dicts go on from there, and what began as random weights has no say.
    again = Trainer(untouched, args | {"max_steps": 3}, train_dataset=rows_of(inputs), **common)
    assert again.train(resume_from_checkpoint=True) and (tmp_path / "out" / "checkpoint-3").exists()
    manifest = (tmp_path / "out" / "checkpoint-3" / "manifest.json").read_text()
    assert not [word for word in ("memory", "nowhere", str(inputs), str(tmp_path)) if word in manifest]
    finished = Trainer(copy.deepcopy(model), args | {"max_steps": 3}, train_dataset=rows_of(inputs), **common)
    result = finished.train(resume_from_checkpoint=True)
    assert result and same_weights(finished.model, untouched)
    assert result.training_loss == result.metrics["train_loss"] == 0.0, "as in transformers: no step is made"
    again.save_model(tmp_path / "copy")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), untouched)
    assert (tmp_path / "copy" / "tokenizer.json").exists() and (tmp_path / "copy" / "README.md").exists()


@pytest.mark.parametrize("num_stages", [1, 2])
def test_tied_embeddings_and_unsaved_changes(inputs_with: Any, tmp_path: Path, num_stages: int) -> None:
    inputs = inputs_with(tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    model.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(inputs / "model").save_pretrained(tmp_path / "changed")
    flags = {**STEPS, "num_stages": num_stages, "save_steps": 0, "method": "e2e" if num_stages == 1 else "lopt"}
    Trainer(
        load_config(
            flags,
            model_name_or_path=tmp_path / "changed",
            train_file=inputs / "rows.jsonl",
            output_dir=tmp_path / "by-files",
        )
    ).train()
    assert Trainer(model, flags | {"output_dir": tmp_path / "out"}, train_dataset=rows_of(inputs)).train()
    assert same_weights(model, AutoModelForCausalLM.from_pretrained(tmp_path / "by-files"))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (num_stages == 1)


def test_formatting_func(inputs: Path, tmp_path: Path) -> None:
    flags = {**STEPS, "output_dir": tmp_path / "out", "model_name_or_path": inputs / "model", "save_steps": 0}
    texts = [{"text": text_of(row)} for row in rows_of(inputs)]
    plain = Trainer(args=flags, train_dataset=texts)
    own = Trainer(
        args=flags | {"output_dir": tmp_path / "own"},
        train_dataset=Dataset.from_list(rows_of(inputs)),
        formatting_func=lambda row: text_of(row),
    )
    assert plain.train() and own.train() and same_weights(own.model, plain.model)


ROW = {"prompt": "a", "completion": "b"}


def noting(*args: Any) -> None:
    """A hook."""


class Needy(TrainerCallback):
    def __init__(self, what: str) -> None:
        self.what = what


def test_changes_of_a_loaded_model_that_its_blocks_would_not_have(inputs: Path, tmp_path: Path) -> None:
    args, rows = {**STEPS, "output_dir": tmp_path / "out"}, rows_of(inputs)
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with pytest.raises(RunError, match="model is a LlamaModel, and the causal language model of its config is Llama"):
        Trainer(model.model, args, train_dataset=rows).train()
    model.model.layers[0].requires_grad_(False)
    frozen = Trainer(model, args, train_dataset=rows, eval_dataset=rows[:2])
    assert frozen.evaluate()["eval_loss"] > 0
    with pytest.raises(LoptError, match=r"model: model\.layers\.0\..* and \d+ more are frozen .*requires_grad_"):
        frozen.train()
    model.requires_grad_(True)
    model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True)  # Leaves hooks of transformers' own.
    model.enable_input_require_grads()
    assert frozen.evaluate()["eval_loss"] > 0
    hook = model.model.layers[2].register_forward_hook(noting)
    with pytest.raises(RunError, match=r"model: model\.layers\.2 has a forward hook, noting: blocks are built by the "):
        frozen.train()
    hook.remove()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(RunError, match="layers.1.mlp.act_fn is a GELU, and its config makes it a SiLU"):
        frozen.train()
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"args": {"train_file": "a.jsonl"}}, "train_dataset and --train_file a.jsonl are both given"),
        (
            {"args": {"eval_split_size": 2}, "eval_dataset": [ROW]},
            "eval_dataset and --eval_split_size 2 are both",
        ),
        ({"args": {"model_name_or_path": "other"}}, "model says --model_name_or_path m, and args say other"),
        ({"args": {"lerning_rate": 1}}, "unknown flag lerning_rate; did you mean --learning_rate?"),
        ({"args": {"max_steps": "many", "output_dir": "o"}}, "--max_steps"),
        ({"args": {"deepspeed": {"zero": 3}}}, "--deepspeed .*: --sharding full"),
        ({"args": 3}, "args is a int; give what load_config returns, a dict"),
        (
            {"args": trl.SFTConfig(output_dir="o", fp16=True, bf16=False, use_cpu=True)},
            "--fp16: float16 would need its loss scaled",
        ),
        ({"peft_config": object()}, "peft_config: .*adapters are not supported"),
        ({"args": {"output_dir": "o", "eval_steps": 3}}, "--eval_steps 3 needs rows to evaluate on"),
        (
            {"data_collator": Dataset.from_list([ROW])},
            "data_collator, the third argument .* is a Dataset; .*train_dataset=",
        ),
        ({"data_collator": object()}, "data_collator: rows become microbatches by the flags"),
        ({"processing_class": object()}, "processing_class is a object; give a tokenizer"),
        ({"model": object()}, "model is a object; give a causal language model"),
        ({"train_dataset": {"train": [ROW]}}, "train_dataset is a dict; give a datasets.Dataset"),
        ({"train_dataset": datasets.DatasetDict(train=Dataset.from_list([ROW]))}, "with the splits train; give one"),
        ({"train_dataset": DataFrame([ROW])}, r"train_dataset is a DataFrame; .* Dataset.from_pandas\(train_dataset\)"),
        ({"callbacks": EarlyStoppingCallback()}, "callbacks is a EarlyStoppingCallback; give a list of callbacks"),
        (
            {"eval_dataset": {"easy": [ROW], "too-hard": [ROW]}},
            "eval_dataset: 'too-hard' is not a name: a letter",
        ),
        ({"callbacks": [print]}, "callbacks: .*print.* is not a transformers.TrainerCallback"),
        ({"callbacks": [ProgressCallback, Needy]}, "the callback Needy: .*'what'; give an object of it"),
        ({"train_dataset": [ROW, "b"]}, "train_dataset: row 2 is 'b'; give dicts"),
        ({"train_dataset": [{"prompt": 1}, {"prompt": "b"}]}, "train_dataset: its rows do not make a table"),
        ({"train_dataset": Dataset.from_list([ROW]).with_transform(dict)}, "has a transform .*; apply it by map"),
    ],
)
def test_mistakes(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(LoptError, match=error):
        Trainer(**{"model": "m", "train_dataset": [ROW], **arguments})


@pytest.mark.parametrize(
    ("given", "dtype", "checkpointing"),
    [
        ({}, "bfloat16", True),
        ({"bf16": True, "gradient_checkpointing": False}, "bfloat16", False),
        ({"bf16": False}, "float32", True),
        ({"model_init_kwargs": {"dtype": "float32"}}, "float32", True),
    ],
)
def test_what_trl_turns_on_is_on(given: dict[str, Any], dtype: str, checkpointing: bool) -> None:
    """Asked for by name or not, which its config does not know; TrainingArguments turn on nothing by themselves."""
    args = trl.SFTConfig(output_dir="o", use_cpu=True, **given)
    stage = Trainer("m", args, train_dataset=[ROW]).config.stage
    assert (stage.dtype, stage.gradient_checkpointing) == (dtype, checkpointing)
    plain = TrainingArguments(output_dir="o", use_cpu=True, **({"bf16": given["bf16"]} if "bf16" in given else {}))
    stage = Trainer("m", plain, train_dataset=[ROW]).config.stage
    assert (stage.dtype, stage.gradient_checkpointing) == ("bfloat16" if given.get("bf16") else "float32", False)


def share_right(prediction: EvalPrediction) -> dict[str, float]:
    predictions, labels = prediction
    targets = labels[:, 1:] != -100
    return {"right": float((predictions[:, :-1] == labels[:, 1:])[targets].mean())}


def test_evaluate(inputs: Path, tmp_path: Path) -> None:
    """Before and after a run, on its rows and on others; the model stays as it is."""
    sets = {"easy": rows_of(inputs)[:6], "hard": Dataset.from_list(rows_of(inputs)[6:9])}
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    untouched = copy.deepcopy(model)
    args = {"output_dir": tmp_path / "out", **STEPS, "save_steps": 0, "eval_steps": 0, "max_steps": 30}
    trainer = Trainer(model, args, train_dataset=rows_of(inputs), eval_dataset=sets, compute_metrics=share_right)
    before = trainer.evaluate()
    assert same_weights(model, untouched) and not (tmp_path / "out").exists()
    assert trainer.train()
    after = trainer.evaluate()
    assert after["eval_easy_loss"] < before["eval_easy_loss"] and after["eval_hard_loss"] < before["eval_hard_loss"]
    history = [logs for logs in trainer.state.log_history if "eval_easy_loss" in logs]
    assert [logs["step"] for logs in history] == [30, 30]
    assert history[0]["eval_hard_loss"] == pytest.approx(after["eval_hard_loss"], rel=1e-6)
    assert 0 <= after["eval_hard_right"] == history[0]["eval_hard_right"] <= 1
    other = trainer.evaluate(rows_of(inputs)[:6], metric_key_prefix="test")
    assert other["test_loss"] == pytest.approx(after["eval_easy_loss"], rel=1e-6)
    # Of a model by its name, the one in the output directory.
    by_name = Trainer(inputs / "model", args | {"output_dir": tmp_path / "other"}, train_dataset=rows_of(inputs))
    with pytest.raises(RunError, match="there are no rows to evaluate on: give eval_dataset, or --eval_file"):
        by_name.evaluate()
    with pytest.raises(LoptError, match="eval_dataset is empty; give rows"):
        by_name.evaluate({})
    assert by_name.evaluate(sets)["eval_easy_loss"] == pytest.approx(before["eval_easy_loss"], rel=1e-6)
    assert by_name.train()
    assert by_name.evaluate(sets)["eval_easy_loss"] == pytest.approx(after["eval_easy_loss"], rel=1e-4)
