"""Whatever goes wrong ends the run with one clear line and leaves nothing half-written."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from launching import environment, torchrun, train
from ranks import Rank, ranks, until
from safetensors.torch import load_file, save_file
from tiny import write_model, write_rows
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel

LEFT = {"metrics.jsonl", "run.json"}
"""What a run leaves that has failed: what it was, and how far it came."""

SETUP_SECONDS = 30
"""More than a start takes on a busy machine."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, usable rows, and unusable ones of every kind."""
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "empty.jsonl").touch()
    rows = [{"question": "what is 1 + 1?", "answer": "2"}] * 4
    (folder / "columns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"query": "1", "id": 7}]))
    pair = json.dumps({"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}) + "\n"
    (folder / "untargeted.jsonl").write_text(pair * 3)
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


def flags(inputs: Path, output_dir: Path, *more: str, steps: int = 100_000) -> list[str]:
    """Of a run that goes on until it is ended, unless `steps` says otherwise."""
    common = f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {output_dir}"
    return [*common.split(), "--max_steps", str(steps), "--per_device_train_batch_size", "2", *more]


def error_of(text: str) -> str:
    """The one line that says what is wrong, in what all ranks have printed."""
    assert not re.search(r'^ *File ".*/lopt_pp/', text, re.MULTILINE), f"a traceback:\n{text}"
    lines = [line for line in text.splitlines() if "lopt-pp: error:" in line]
    assert len(lines) == 1, f"not one error line:\n{text}"
    return lines[0]


def failed(started: list[Rank], seconds: float = SETUP_SECONDS) -> str:
    """Waits until all ranks have failed by themselves, and returns the one error line."""
    for rank in started:
        assert rank.status(seconds) > 0, rank.text
    text = "".join(rank.text for rank in started)
    assert "Traceback" not in text, text
    return error_of(text)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def steps_of(output_dir: Path) -> int:
    """The steps that the metrics have so far."""
    path = output_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) // 2 if path.exists() else 0


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


def loads(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of the saved model, all of them finite."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    state = model.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    return state


def test_a_first_stage_loss_that_is_not_finite(inputs: Path, tmp_path: Path) -> None:
    """Step and microbatch are named, and the weights of both stages from before are kept."""
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    # Overflows when squared, as the reconstruction loss does; the second stage normalizes it away.
    tensors["model.embed_tokens.weight"][9] = 1e25
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    rows = [{"input_ids": [5, 6, 7, 8, 6], "labels": [-100, -100, 7, 8, 6]} for _ in range(12)]
    rows[7]["input_ids"] = [5, 6, 7, 9, 6]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = flags(inputs, tmp_path / "out", "--model_name_or_path", str(model), "--train_file")
    given += [str(tmp_path / "rows.jsonl"), "--shuffle_dataset", "False", "--gradient_accumulation_steps", "2"]
    with ranks(tmp_path, given, given) as started:
        error = failed(started)
    assert re.search(r"stage 0: the reconstruction_loss of step 2, microbatch 2 is (nan|inf)", error)
    assert str(tmp_path / "out" / "last_good") in error
    kept = loads(tmp_path / "out" / "last_good")
    moved = {name for name in kept if not torch.equal(kept[name], tensors[name])}
    # The second stage may not have come to its first step yet.
    assert any(".layers.0." in name for name in moved)
    assert "stage 0 has done 1" in (tmp_path / "out" / "last_good" / "README.md").read_text()
    assert all(name in LEFT or name.startswith("last_good/") for name in files(tmp_path / "out"))


def test_a_last_stage_loss_that_is_not_finite(inputs: Path, tmp_path: Path) -> None:
    """Also when the first stage has finished its part by then."""
    given = flags(inputs, tmp_path / "out", "--queue_depth", "50", "--learning_rate", "1e30", steps=4)
    given += ["--local_learning_rate", "1e-4"]
    with ranks(tmp_path, given, given) as started:
        error = failed(started)
    assert re.search(r"stage 1: the loss of step 2, microbatch 1 is (nan|inf)", error)
    loads(tmp_path / "out" / "last_good")
    assert "stage 1 has done 1" in (tmp_path / "out" / "last_good" / "README.md").read_text()
    assert all(name in LEFT or name.startswith("last_good/") for name in files(tmp_path / "out"))


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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_dies_is_named(victim: int, inputs: Path, tmp_path: Path) -> None:
    given = flags(inputs, tmp_path / "out")
    with ranks(tmp_path, given, given) as started:
        until(lambda: steps_of(tmp_path / "out") > 2, SETUP_SECONDS)
        started[victim].kill()
        other = started[1 - victim]
        assert other.status(15) == 1
        assert f"stage {victim} (rank {victim})" in error_of(other.text)
        assert "has died" in error_of(other.text)
    assert files(tmp_path / "out") == LEFT


def test_a_stage_that_dies_after_the_other_has_finished(inputs: Path, tmp_path: Path) -> None:
    """The first stage then waits for no message, but for the other's part of the model."""
    out = tmp_path / "out"
    given = flags(inputs, out, "--queue_depth", "60", steps=60)
    with ranks(tmp_path, given, given) as started:
        until(lambda: steps_of(out) > 0, SETUP_SECONDS)
        started[1].kill(signal.SIGSTOP)
        until(lambda: list(out.glob("**/*00001-of-00002.safetensors")), SETUP_SECONDS)
        started[1].kill()
        assert started[0].status(15) == 1
        assert "stage 1 (rank 1) has died" in error_of(started[0].text)
    assert files(out) == LEFT


def test_a_stage_that_dies_under_the_launcher_is_named(inputs: Path, tmp_path: Path) -> None:
    """The launcher ends the other stage, which has the time to say why."""
    command = torchrun(2, "-m", "lopt_pp.train", *flags(inputs, tmp_path / "out"))
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as launcher:
        try:
            until(lambda: steps_of(tmp_path / "out") > 2, SETUP_SECONDS)
            victim = psutil.Process(launcher.pid).children()[0]
            rank = victim.environ()["RANK"]
            victim.kill()
            _, text = launcher.communicate(timeout=15)
        finally:
            launcher.terminate()
    assert launcher.returncode != 0
    assert f"stage {rank} (rank {rank}) has died" in error_of(text)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_hangs_is_named(victim: int, inputs: Path, tmp_path: Path) -> None:
    given = flags(inputs, tmp_path / "out", "--stream_timeout", "3")
    with ranks(tmp_path, given, given) as started:
        until(lambda: steps_of(tmp_path / "out") > 2, SETUP_SECONDS)
        started[victim].kill(signal.SIGSTOP)
        other = started[1 - victim]
        assert other.status(15) == 1
        assert f"stage {victim} (rank {victim}) does not answer for 3 s (--stream_timeout)" in error_of(other.text)
        started[victim].kill(signal.SIGCONT)
        assert started[victim].status(15) == 1
    assert files(tmp_path / "out") == LEFT


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
