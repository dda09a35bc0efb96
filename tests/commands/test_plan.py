"""`lopt-pp plan`: from a config to tables."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import tiny_config
from launching import environment
from tiny import write_model

from lopt_pp import cli
from lopt_pp.planning.capacity import HEADROOM

GIB = 2**30


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a config and no weights."""
    folder = tmp_path_factory.mktemp("config")
    tiny_config("llama", vocab_size=1000).save_pretrained(folder)
    return folder


@pytest.mark.slow
def plan(capsys: pytest.CaptureFixture[str], model: object, flags: str = "") -> dict[str, Any]:
    given = f"plan {model} --device cpu --max_length 32 --per_device_train_batch_size 4 --json {flags}"
    status = cli.main(given.split())
    found = json.loads(capsys.readouterr().out)
    assert status == (1 if found["fits"] is False else 0)
    return found


@pytest.mark.slow
def test_a_plan_needs_a_config_and_nothing_else(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_directory, by_file = plan(capsys, config), plan(capsys, config / "config.json")
    assert by_directory == by_file
    assert [entry["layers"] for entry in by_directory["stages"]] == [[[0, 1]], [[2, 3]]]
    assert by_directory["boundary"]["bytes_per_microbatch"] == 4 * 32 * 64 * 4
    for entry in [*by_directory["stages"], by_directory["end_to_end"]["one_process"]]:
        assert entry["total"] == sum(entry["memory"].values())
        assert entry["memory"]["optimizer"] == pytest.approx(2 * entry["memory"]["weights"], rel=0.01)
        assert entry["fits"] is None and by_directory["fits"] is None
    # A block of the pipeline has no local head.
    parameters = [entry["parameters"] for entry in by_directory["end_to_end"]["pipeline"]]
    assert sum(parameters) == by_directory["end_to_end"]["one_process"]["parameters"]


def test_the_file_of_a_run_is_taken_as_it_is(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With what means nothing here; the command line wins."""
    run = tmp_path / "run.yaml"
    run.write_text(
        f"model_name_or_path: {config}\ntrain_file: rows.jsonl\noutput_dir: out\nmax_steps: 5\nsave_steps: 1\n"
        f"learning_rate: 1e-4\nbf16: true\nmax_length: 32\nper_device_train_batch_size: 2\nnproc: 4\nmax_restarts: 3\n"
    )
    found = plan(capsys, run)
    assert found == plan(capsys, config, f"--config {run}") == plan(capsys, config, "--dtype bfloat16 --nproc 4")
    assert (found["rows"], found["num_processes"], found["num_replicas"]) == (4, 2, 2)
    run.write_text(f"model_name_or_path: {config}\noutput_dirr: out\n")
    assert cli.main(["plan", str(run)]) == 2
    assert f"{run}: unknown flag output_dirr; " in capsys.readouterr().err


def test_the_balanced_split_is_the_one_that_it_names(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, config, "--num_stages 3")["balanced"]
    assert found["operations"] <= found["operations_as_planned"]
    cuts = ",".join(map(str, found["first_layers"]))
    by_hand = plan(capsys, config, f"--num_stages 3 --split {cuts}")
    assert max(entry["operations"] for entry in by_hand["processes"]) == found["operations"]


def test_stages_of_one_process_take_turns(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, config, "--num_stages 4 --pipeline_processes 2")
    assert [entry["stages"] for entry in found["processes"]] == [[0, 1], [2, 3]]
    for process in found["processes"]:
        own = [found["stages"][stage] for stage in process["stages"]]
        assert process["parameters"] == sum(entry["parameters"] for entry in own)
        assert process["memory"]["weights"] == sum(entry["memory"]["weights"] for entry in own)
        assert process["memory"]["activations"] < sum(entry["memory"]["activations"] for entry in own)
        assert process["operations"] == sum(entry["operations"] for entry in own)


@pytest.mark.slow
def test_what_would_make_it_fit_is_kept_if_it_helps(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roomy = plan(capsys, config, "--gpu_memory 1")
    assert roomy["fits"] and roomy["remedies"] == []
    fullest = max(entry["total"] for entry in roomy["processes"])
    memory = fullest / (1 - HEADROOM) / GIB
    tight = plan(capsys, config, f"--gpu_memory {memory * 0.99}")
    assert not tight["fits"] and tight["fits_with_remedies"]
    assert tight["remedies"][0]["flags"] == "--gradient_checkpointing true"
    hopeless = plan(capsys, config, f"--gpu_memory {memory / 1000}")
    assert not hopeless["fits_with_remedies"]
    totals = [remedy["total"] for remedy in hopeless["remedies"]]
    assert totals == sorted(totals, reverse=True) and totals[0] < fullest
    # The flags say what was measured.
    flags = " ".join(remedy["flags"] for remedy in hopeless["remedies"])
    assert max(entry["total"] for entry in plan(capsys, config, flags)["processes"]) == totals[-1]


@pytest.mark.slow
def test_tables_for_people(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = f"plan {config} --device cpu --max_length 32 --gradient_accumulation_steps 2 --gpu-memory 0.001"
    assert cli.main(flags.split()) == 1, "it does not fit"
    text = capsys.readouterr().out
    assert "LlamaForCausalLM, 4 layers, on CPUs (--device cpu): 2 stages in 2 processes" in text
    assert "2 microbatches of 8 x 32 tokens in a step, float32" in text
    assert "1F1B pipeline, 2 microbatches under way on the first stage" in text
    assert "balanced by operations: --split " in text
    assert "does not fit with a tenth to spare" in text


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_is_planned_for_without_one(config: Path, dtype: str) -> None:
    """In a process of its own: what has run before must not matter."""
    command = [sys.executable, "-m", "lopt_pp.cli", "plan", str(config), "--json", "--dtype", dtype]
    given = [*command, "--gradient_accumulation_steps", "2", "--gradient_checkpointing"]
    done = subprocess.run(given, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["device"] == "cuda"
    for entry in found["stages"]:
        assert entry["memory"]["weights"] == pytest.approx(4 * entry["parameters"], rel=0.05)
        assert entry["memory"]["gradients"] == pytest.approx(4 * entry["parameters"], rel=0.05)
        assert 0 < entry["kept_for_backward"] <= entry["memory"]["activations"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ("--num_stages 5", "--num_stages 5 is more than the model's 4 layers"),
        ("--num_stages 2 --split 9", "--split 9: layer numbers that ascend, from 1 to 3; the model has 4 layers"),
        ("--num_stages 2 --pipeline_processes 3", "3 processes do not fit --num_stages 2"),
        ("--gpu_memory 0", "--gpu_memory 0: a number of GiB above 0"),
        ("--max_length 1", "--max_length 1: at least 2"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: at least 1"),
        ("--method e2e", "--method e2e: end-to-end training is planned beside any other method"),
        ("--gpu_memry 80", "unknown flag --gpu_memry; did you mean --gpu_memory?"),
        (
            "--output_dir out",
            "unknown flag --output_dir of lopt-pp plan; it is one of lopt-pp train that changes nothing",
        ),
        ("--max_steps 5", "unknown flag --max_steps of lopt-pp plan; it is one of lopt-pp train"),
        ("--lr 1", "unknown flag --lr; it is --learning_rate here"),
    ],
)
def test_mistakes_are_one_line(config: Path, flags: str, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(config), *flags.split()]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert error.replace("\\", "") in said.err


def test_no_config_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert cli.main(["plan", "--num_stages", "2"]) == 2
    assert "--model_name_or_path" in capsys.readouterr().err
    tiny_config("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing_like_it"}')
    assert cli.main(["plan", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_quantization_is_believed_unless_the_weights_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_model(tmp_path / "model")
    content = json.loads((model / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (model / "config.json").write_text(json.dumps(content))
    given = [str(model), "--max_length", "8", "--device", "cpu"]
    assert cli.main(["plan", *given]) == 0
    capsys.readouterr()
    (model / "model.safetensors").unlink()
    assert cli.main(["plan", *given]) == 2
    assert "has quantized weights (FP8)" in capsys.readouterr().err


def test_end_to_end_in_one_process_holds_tied_embeddings_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    found = plan(capsys, tmp_path)
    one, several = found["end_to_end"]["one_process"], found["end_to_end"]["pipeline"]
    embeddings = 128 * 64
    assert one["parameters"] == sum(entry["parameters"] for entry in several) - embeddings
    assert one["memory"]["optimizer"] == pytest.approx(8 * one["parameters"], rel=0.01)
    frozen = plan(capsys, tmp_path, "--train_embeddings false")["end_to_end"]["one_process"]
    assert frozen["parameters"] == one["parameters"] + embeddings
