"""A run from the command line to the trained model, as a user starts it and as a user sees it."""

import contextlib
import fcntl
import gzip
import importlib.util
import json
import os
import pty
import re
import statistics
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated import emulated
from launching import environment, torchrun, train
from results import load_model
from safetensors import safe_open
from tiny import write_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
import lopt_pp.train
from lopt_pp.metrics.records import PHASES
from lopt_pp.metrics.state import read_state

STEPS = 60


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose embeddings are tied, and rows."""
    return write_inputs(tmp_path_factory.mktemp("inputs"), rows=100, tie_word_embeddings=True)


def flags(inputs: Path, output_dir: Path) -> list[str]:
    rows = inputs / "rows.jsonl"
    return f"--model_name_or_path {inputs / 'model'} --train_file {rows} --output_dir {output_dir}".split()


@pytest.fixture(scope="module")
def trained(inputs: Path) -> tuple[Path, str]:
    """The output directory of a run of the module, and what the run has printed."""
    given = [*flags(inputs, inputs / "out"), "--max_steps", str(STEPS), "--learning_rate", "3e-3"]
    more = ["--logging_steps", "20", "--reconstruction_weight", "5", "--trace", "11-12", "--probe_steps", "20"]
    more += ["--profile_steps", "11-12"]
    result = train(2, *given, *more)
    assert result.returncode == 0, result.stderr
    return inputs / "out", result.stderr


def records_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_the_result_is_an_ordinary_model(trained: tuple[Path, str]) -> None:
    model = load_model(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    question = [{"role": "user", "content": "what is 1 + 2?"}]
    text = str(tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False))
    prompt = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    output = model.generate(prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    answer = str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True))
    assert re.fullmatch(r" *(\d *)+", answer), "the trained model does not answer a sum with a number"


def test_one_index_joins_a_shard_of_each_stage(inputs: Path, trained: tuple[Path, str]) -> None:
    out = trained[0]
    shards = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shards[path.name] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert list(shards) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    first, second = shards.values()
    whole = AutoModelForCausalLM.from_pretrained(inputs / "model").state_dict()
    assert first.keys() | second.keys() == whole.keys(), "a head's key, or a missing one"
    assert not first.keys() & second.keys()
    assert "model.embed_tokens.weight" in first and "lm_head.weight" in second

    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    sizes = [tensor.nbytes for tensors in shards.values() for tensor in tensors.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert not list(out.glob(".*")), "something unfinished is left"
    plain = out.parent / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in out.iterdir() if path.is_file()} == {plain.stat().st_mode}


def test_tied_embeddings_are_untied(trained: tuple[Path, str]) -> None:
    assert json.loads((trained[0] / "config.json").read_text())["tie_word_embeddings"] is False
    state = AutoModelForCausalLM.from_pretrained(trained[0]).state_dict()
    assert not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


def test_the_model_card_says_how_it_was_trained(inputs: Path, trained: tuple[Path, str]) -> None:
    card = (trained[0] / "README.md").read_text()
    assert "base_model" not in card and str(inputs) not in card
    assert "Data: 100 rows of local files: 100 used\n" in card
    assert f"Optimizer steps: {STEPS}\n" in card
    for row in ("`--learning_rate` | 0.003", "`--reconstruction_weight` | 5.0", "`--lr_scheduler_type` | linear"):
        assert f"| {row} |\n" in card


def test_metrics_of_every_step_and_stage(trained: tuple[Path, str]) -> None:
    records = records_of(trained[0])
    assert [(r["step"], r["stage"]) for r in records] == [(s, k) for s in range(1, STEPS + 1) for k in (0, 1)]
    for record in records:
        assert ("loss" in record, "reconstruction_loss" in record) == (record["stage"] == 1, record["stage"] == 0)
        assert record["grad_norm"] > 0 and record["num_tokens"] > 0
        assert record["tokens_per_second"] == pytest.approx(record["num_tokens"] / record["step_seconds"])
        spent = [record[f"{phase}_seconds"] for phase in PHASES]
        assert min(spent) >= 0 and 0 < sum(spent) <= record["step_seconds"] + 1e-6
    first, second = records[0::2], records[1::2]
    assert [r["num_tokens"] for r in first] == [r["num_tokens"] for r in second]
    # The last stage's rate falls linearly from the flag's; the other's is a tenth of it.
    rates = [3e-3 * (1 - step / STEPS) for step in range(STEPS)]
    assert [r["learning_rate"] for r in second] == pytest.approx(rates)
    assert [r["learning_rate"] for r in first] == pytest.approx([rate / 10 for rate in rates])


def test_what_the_run_tells_about_itself(trained: tuple[Path, str]) -> None:
    """The drift, the queue, the trace on one clock, `run.json`, and a report of all of it."""
    out = trained[0]
    records = records_of(out)
    assert [(r["step"], r["stage"]) for r in records if "drift_norm" in r] == [(20, 0), (40, 0), (60, 0)]
    assert all((0 <= r["queue_length"] <= 4) if r["stage"] == 0 else "queue_length" not in r for r in records)

    specs = [event for event in json.loads((out / "trace.json").read_text())["traceEvents"] if event["ph"] == "X"]
    assert {(spec["tid"], spec["args"]["step"]) for spec in specs} == {(k, s) for k in (0, 1) for s in (11, 12)}
    for step in (11, 12):
        (sent,) = (s for s in specs if (s["tid"], s["args"]["step"], s["name"]) == (0, step, "send"))
        (got,) = (s for s in specs if (s["tid"], s["args"]["step"], s["name"]) == (1, step, "receive"))
        assert sent["ts"] < got["ts"] + got["dur"], "received before it was sent: the clocks are not one"

    for stage in (0, 1):
        events = json.loads(gzip.decompress((out / "profile" / f"stage-{stage}.json.gz").read_bytes()))["traceEvents"]
        names = {event["name"] for event in events if event.get("ph") == "X"}
        assert {"step 11", "step 12", "aten::mm", "Optimizer.step#AdamW.step"} <= names
        assert not {"step 10", "step 13"} & names

    about = json.loads((out / "run.json").read_text())
    stages = [stage for process in about["processes"] for stage in process["stages"]]
    assert [(stage["stage"], stage["layers"], stage["loss"]) for stage in stages] == [
        (0, [0, 2], "reconstruction_loss"),
        (1, [2, 4], "loss"),
    ]
    assert about["flags"]["learning_rate"] == 3e-3 and about["num_steps"] == STEPS
    assert all(process["clock"] == {"seconds": 0.0, "error": 0.0} for process in about["processes"])
    state = read_state(out)
    assert state is not None and (state.state, state.step, state.reason) == ("finished", STEPS, "")
    assert lopt_pp.cli.main(["report", str(out)]) == 0
    assert "The pipeline over time" in (out / "report.html").read_text()


def test_both_losses_fall(trained: tuple[Path, str]) -> None:
    for stage, name in enumerate(("reconstruction_loss", "loss")):
        losses = [record[name] for record in records_of(trained[0]) if record["stage"] == stage]
        assert statistics.mean(losses[-5:]) < 0.6 * statistics.mean(losses[:5])


def test_the_log_says_who_speaks_and_how_it_went(trained: tuple[Path, str]) -> None:
    out, log = trained
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
    lines = [line for line in log.splitlines() if re.match(rf"{moment}\[stage \d \(rank \d\)\] ", line)]
    assert any("cut into layers 0-1; layers 2-3; 60 steps" in line for line in lines)
    steps = [re.search(r"step (\d+)/60: (.*)", line) for line in lines]
    assert [match[1] for match in steps if match] == ["20", "40", "60"]
    number = r"[\d.e+-]+"
    own = rf" {number} \(lr {number}, grad_norm {number}\), "
    status = rf"stage 0 reconstruction_loss{own}stage 1 loss{own}\d+ tokens/s(, \d\d:\d\d left)?"
    assert all(re.fullmatch(status, match[2]) for match in steps if match)
    assert any(re.search(rf"the model is in {out}, after \d+ min \d\d s of training$", line) for line in lines)
    time_shares = "% computing, .*% waiting to receive, .*% waiting to send"
    assert [bool(re.search(f"stage {stage}: .*{time_shares}", log)) for stage in (0, 1)] == [True, True]
    assert not re.search(r"/60 \[", log), "a progress bar where there is no terminal"


@pytest.fixture(scope="module")
def configured(inputs: Path) -> tuple[Path, str]:
    """The same of a run of the installed command with a YAML file, on a terminal of 80 columns."""
    settings: dict[str, Any] = {"model_name_or_path": str(inputs / "model"), "train_file": str(inputs / "rows.jsonl")}
    settings |= {"output_dir": str(inputs / "configured"), "num_train_epochs": 50, "seed": 7, "learning_rate": 1e-3}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "shuffle_dataset": False}
    settings |= {"report_to": ["tensorboard"]} if importlib.util.find_spec("tensorboard") else {}
    file = inputs / "run.yaml"
    file.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in settings.items()))
    command = [str(Path(sys.executable).with_name("lopt-pp")), "train", "--config", str(file), "--num_train_epochs"]
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    with subprocess.Popen(torchrun(2, "--no-python", *command, "3.5"), env=environment(), stderr=end) as launcher:
        os.close(end)
        shown = b""
        with contextlib.suppress(OSError):  # At the terminal's end.
            while part := os.read(terminal, 65536):
                shown += part
    os.close(terminal)
    assert launcher.returncode == 0, shown.decode()
    return inputs / "configured", shown.decode()


def test_a_yaml_file_and_epochs(configured: tuple[Path, str]) -> None:
    """A flag on the command line wins over the file; 100 rows in steps of 8 are 13 steps an epoch."""
    records = records_of(configured[0])[0::2]
    assert [record["step"] for record in records] == list(range(1, 47))
    assert records[12]["epoch"] == 1.0
    epochs = [sum(record["num_tokens"] for record in records[start : start + 13]) for start in (0, 13, 26)]
    assert len(set(epochs)) == 1, "an epoch does not have every row once"
    card = (configured[0] / "README.md").read_text()
    for row in ("`--seed` | 7", "`--num_train_epochs` | 3.5", "`--shuffle_dataset` | False"):
        assert f"| {row} |\n" in card
    assert AutoModelForCausalLM.from_pretrained(configured[0]).config.num_hidden_layers == 4


def test_one_progress_bar(configured: tuple[Path, str]) -> None:
    """With the step, the time left, both losses and the speed; no line is torn, and one bar is left."""
    rows = [row for row in emulated(configured[1]) if row]
    (last,) = [row for row in rows if "/46 [" in row]
    assert last.startswith("|") and "| 46/46 [" in last and last.endswith("tokens/s]")
    assert all(row.startswith("[stage") for row in rows if "[stage" in row)
    bar = r"(\d+)/46 \[[\d:]+<[\d:?]+, loss [\d.e-]+, reconstruction [\d.e-]+, \d+ tokens/s\]"
    steps = [int(step) for step in re.findall(bar, configured[1])]
    assert len(set(steps)) > 3, configured[1]
    # Two processes that each moved a bar would go back; one repeats itself around a log line.
    assert steps == sorted(steps) and steps[-1] == 46


def test_a_tracker_hears_of_all_stages_and_of_all_flags(configured: tuple[Path, str]) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(configured[0] / "runs"))
    events.Reload()
    losses = [record["loss"] for record in records_of(configured[0])[1::2]]
    means = [statistics.mean(losses[start : start + 10]) for start in range(0, 46, 10)]
    shown = events.Scalars("train/loss")
    assert [event.step for event in shown] == [10, 20, 30, 40, 46]
    assert [event.value for event in shown] == pytest.approx(means, rel=1e-5)
    assert len(events.Scalars("train/reconstruction_loss/stage 0")) == 5
    flags = json.loads(events.Tensors("args/text_summary")[0].tensor_proto.string_val[0])
    assert flags["report_to"] == ["tensorboard"] and flags["num_train_epochs"] == 3.5


def test_help_reads_like_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        lopt_pp.train.main(["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "torchrun --rdzv-backend lopt-pp --nproc-per-node 2 -m lopt_pp.train --config run.yaml" in text
    assert "--local_learning_rate FLOAT Peak learning rate of the earlier stages" in text
