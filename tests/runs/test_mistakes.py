"""What a user gets wrong is one clear line, before anything is written."""

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from failing import SETUP_SECONDS, error_of, failed, files, flags, steps_of
from launching import train
from ranks import ranks, until
from safetensors.torch import load_file
from tiny import write_inputs, write_model, write_rows
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, usable rows, and unusable ones of every kind."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "empty.jsonl").touch()
    rows = [{"question": "what is 1 + 1?", "answer": "2"}] * 4
    (folder / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "1", "id": 7}]))
    pair = json.dumps({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}) + "\n"
    (folder / "untargeted.jsonl").write_text(pair * 3)
    (folder / "latin1.jsonl").write_bytes(pair.encode() + b'\n{"question": "caf\xe9", "answer": "b"}\n')
    (folder / "null.jsonl").write_text("null\n" + pair)
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(pair.encode() * 9, mtime=0)[:-9])
    for kind in ("pickled", "weightless"):
        shutil.copytree(folder / "model", folder / kind)
        (folder / kind / "model.safetensors").unlink()
    torch.save({}, folder / "pickled" / "pytorch_model.bin")
    (folder / "typed.yaml").write_text("gradient_accumulation_steps: two\n")
    (folder / "unknown.yaml").write_text("warmup_step: 3\n")
    bert = BertConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    shutil.copytree(folder / "model", folder / "bidirectional")
    BertLMHeadModel(bert).save_pretrained(folder / "bidirectional")
    return folder


MISTAKES = {
    "fewer layers than stages": (
        "--num_stages 5",
        r"--num_stages 5 is more than the model's 4 layers; give at most 4",
    ),
    "processes that do not fit": (
        "--pipeline_processes 1 --data_parallel 1",
        r"2 processes do not fit --num_stages 2 --pipeline_processes 1 --data_parallel 1: .*torchrun --nproc-per-node",
    ),
    "no file": ("--train_file {}/nothing.jsonl", r"--train_file .*/nothing\.jsonl does not exist"),
    "an empty file": ("--train_file {}/empty.jsonl", r"--train_file .*/empty\.jsonl is empty"),
    "a row without usable columns": (
        "--train_file {}/columns.jsonl",
        r"row 5 of .*/columns\.jsonl: no usable columns \(it has: query, id\)",
    ),
    "a text that is not UTF-8": (
        "--train_file {}/latin1.jsonl",
        r"row 2 of .*/latin1\.jsonl \(line 3\): it is not UTF-8 \(.*: 0xe9\); save the file as UTF-8",
    ),
    "a row that is null": (
        "--train_file {}/null.jsonl",
        r"row 1 of .*/null\.jsonl: it is not a JSON object, but null; leave it out",
    ),
    "a streamed row that is null": (
        "--streaming --train_file {}/null.jsonl",
        r"row 1 of .*/null\.jsonl: it is not a JSON object, but null; leave it out",
    ),
    "a compressed file that is cut off": (
        "--train_file {}/cut.jsonl.gz",
        r"--train_file .*/cut\.jsonl\.gz cannot be read: it is damaged or cut off \(.*\); copy it again",
    ),
    "rows all too long": (
        "--max_length 12",
        r"none of the 40 rows of .*rows\.jsonl can be used \(40 longer than --max_length 12\)",
    ),
    "rows all without a target": (
        "--train_file {}/untargeted.jsonl",
        r"none of the 3 rows of .*untargeted\.jsonl can be used \(3 without a target token\)",
    ),
    "no model": ("--model_name_or_path {}/nothing", r"--model_name_or_path .*/nothing"),
    "pickled weights": (
        "--model_name_or_path {}/pickled",
        r"no safetensors weights .*only pickled weights \(pytorch_model\.bin\), which are refused",
    ),
    "no weights": ("--model_name_or_path {}/weightless", r"weightless: no safetensors weights .*, none; convert"),
    "a class that does not split": (
        "--model_name_or_path {}/bidirectional",
        r"BertLMHeadModel is not causal: a later token changes the logits",
    ),
    "an unknown flag": ("--learning_rat 1e-4", r"unknown flag --learning_rat; did you mean --learning_rate\?"),
    "a flag of the wrong type": ("--max_steps many", r"--max_steps\S*: invalid int value: 'many'"),
    "a flag out of range": ("--queue_depth 0", r"--queue_depth 0: at least 1"),
    "an unknown flag in the file": (
        "--config {}/unknown.yaml",
        r"unknown\.yaml: unknown flag warmup_step; did you mean --warmup_steps\?",
    ),
    "a wrong type in the file": (
        "--config {}/typed.yaml",
        r"--gradient_accumulation_steps\S*: invalid int value: 'two'",
    ),
    "a function that is not there": (
        "--dataset_mapping nowhere:function",
        r"--dataset_mapping nowhere:function: nowhere cannot be imported: ModuleNotFoundError: No module named",
    ),
    "a timeline after the last step": (
        "--max_steps -1 --num_train_epochs 1 --trace 90-95",
        r"--trace 90-95: the run has \d+ steps",
    ),
    "no GPU for NCCL": ("--backend nccl", r"--backend nccl: this machine has no GPU that PyTorch can use"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake: str, inputs: Path, tmp_path: Path) -> None:
    if mistake == "no GPU for NCCL" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    given, message = MISTAKES[mistake]
    wrong = flags(inputs, tmp_path / "out", *given.format(inputs).split())
    with ranks(tmp_path, wrong, wrong) as started:
        assert re.search(message, failed(started))
    assert not files(tmp_path / "out")


def test_a_mistake_under_the_launcher_is_one_line(inputs: Path, tmp_path: Path) -> None:
    result = train(2, *flags(inputs, tmp_path / "out", "--train_file", "nothing.jsonl"))
    assert result.returncode != 0
    assert "--train_file nothing.jsonl does not exist" in error_of(result.stderr)
    assert not files(tmp_path / "out")


def test_a_model_is_not_overwritten_by_accident(inputs: Path, tmp_path: Path) -> None:
    """And not by a run that fails before it has a model of its own."""
    out = write_model(tmp_path / "out")
    before = {name: (out / name).read_bytes() for name in files(out)}
    given = flags(inputs, out)
    with ranks(tmp_path / "refused", given, given) as started:
        assert re.search(r"--output_dir .*/out already holds a model; give another, or --overwrite", failed(started))
    given = flags(inputs, out, "--overwrite_output_dir", "--train_file", "nothing.jsonl")
    with ranks(tmp_path / "early", given, given) as started:
        failed(started)
    assert {name: (out / name).read_bytes() for name in files(out)} == before

    given = flags(inputs, out, "--overwrite_output_dir")
    with ranks(tmp_path / "killed", given, given) as started:
        until(lambda: steps_of(out) > 2, SETUP_SECONDS)
        started[1].kill()
        started[0].status(15)
    assert {name: (out / name).read_bytes() for name in before} == before

    given = flags(inputs, out, "--overwrite_output_dir", "--learning_rate", "1e-3", steps=2)
    with ranks(tmp_path / "done", given, given) as started:
        assert [rank.status(SETUP_SECONDS) for rank in started] == [0, 0], started[0].text + started[1].text
    new = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert not (out / "model.safetensors").exists()
    assert not torch.equal(new["lm_head.weight"], load_file(inputs / "model" / "model.safetensors")["lm_head.weight"])


REMOTE_CODE = """\
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

(Path(__file__).parent / "MARKER").touch()
Path("MARKER").touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaModel):
    def __init__(self, config):
        super().__init__(config)
        self.layers[0].register_forward_hook(lambda layer, args, output: setattr(self, "first", output))
        self.layers[-1].register_forward_pre_hook(lambda layer, args: (args[0] + getattr(self, "first", 0), *args[1:]))


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
"""


def test_code_of_a_model_does_not_run_unless_trusted(inputs: Path, tmp_path: Path) -> None:
    """Once it runs, its class is checked like any other: this one has a connection across the boundary."""
    model, marker = shutil.copytree(inputs / "model", tmp_path / "model"), tmp_path / "marker"
    (model / "own.py").write_text(REMOTE_CODE.replace("MARKER", str(marker)))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    given = flags(inputs, tmp_path / "out", "--model_name_or_path", str(model))
    with ranks(tmp_path / "untrusted", given, given) as started:
        assert "comes with Python code of its own, which is not run unless you give --trust_remote" in failed(started)
    assert not marker.exists()
    given = [*given, "--trust_remote_code"]
    with ranks(tmp_path / "trusted", given, given) as started:
        error = failed(started)
    assert marker.exists()
    assert re.search(
        r"OwnForCausalLM cannot be split exactly.*layers 0-1, layers 2-3.*besides the hidden states", error
    )
    assert not files(tmp_path / "out")


DISAGREEMENTS = {
    "data": (
        "--train_file {}/rows.jsonl",
        "--train_file {}/other.jsonl",
        r"rank 0 and rank 1 disagree on the training rows \(sha256\): '\w+' against '\w+'",
    ),
    "a flag": ("--seed 1", "--seed 2", r"rank 0 and rank 1 disagree on --seed: 1 against 2"),
    "the model": (
        "--model_name_or_path {}/model",
        "--model_name_or_path {}/other",
        r"rank 0 and rank 1 disagree on the model's config",
    ),
    "a file that one lacks": (
        "--train_file {}/rows.jsonl",
        "--train_file {}/nothing.jsonl",
        r"nothing\.jsonl does not exist",
    ),
}


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_stages_that_are_given_different_things(what: str, inputs: Path, tmp_path: Path) -> None:
    write_rows(inputs / "other.jsonl", seed=1)
    write_model(inputs / "other", rms_norm_eps=1e-3)
    *both, message = DISAGREEMENTS[what]
    own = [flags(inputs, tmp_path / "out", *given.format(inputs).split()) for given in both]
    with ranks(tmp_path, *own) as started:
        assert re.search(message, failed(started))
    assert not files(tmp_path / "out")
