"""A run that a signal asks to stop: ends a step, saves, leaves with a status of its own, and goes on as if nothing had
happened."""

import functools
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import ranks, to_the_end, until
from results import weights
from tiny import InputsWith

from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import STOPPED, complete_checkpoints
from lopt_pp.metrics.state import read_state
from lopt_pp.train import STOPPED_STATUS

STEPS = 100
LAYOUTS = {
    "one process": (1, "--num_stages 2"),
    "two processes": (2, ""),
    "three stages": (3, "--num_stages 3 --queue_depth 5"),
    "replicas": (4, "--data_parallel 2"),
    "end to end": (2, "--method e2e"),
}


@pytest.fixture(scope="module")
def inputs(inputs_with: InputsWith) -> Path:
    return inputs_with(attention_dropout=0.1)


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the output directory of a layout's run that nothing stops; each layout runs once."""

    @functools.cache
    def of(layout: str) -> Path:
        folder = tmp_path_factory.mktemp("undisturbed")
        processes, more = LAYOUTS[layout]
        to_the_end(folder, processes, flags(inputs, folder / "out", more))
        return folder / "out"

    return of


def flags(inputs: Path, out: Path, more: str = "", steps: int = STEPS) -> list[str]:
    given = f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {out}"
    given += f" --max_steps {steps} --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --save_steps 1000"
    return [*given.split(), "--learning_rate", "1e-3", *more.split()]


def steps_of(out: Path) -> int:
    """The steps that the metrics have of stage 0."""
    path = out / "metrics.jsonl"
    return path.read_text().count('"stage": 0') if path.exists() else 0


@pytest.mark.parametrize(
    ("layout", "number", "who"),
    [
        ("one process", signal.SIGINT, [0]),
        ("two processes", signal.SIGTERM, [0, 1]),
        ("two processes", signal.SIGHUP, [1]),
        ("three stages", signal.SIGTERM, [1]),
        ("replicas", signal.SIGUSR1, [3]),
        ("end to end", signal.SIGTERM, [1]),
    ],
)
def test_it_stops_and_goes_on(
    layout: str,
    number: signal.Signals,
    who: list[int],
    inputs: Path,
    undisturbed: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    processes, more = LAYOUTS[layout]
    out = tmp_path / "out"
    arguments = flags(inputs, out, more)
    with ranks(tmp_path / "first", *[arguments] * processes) as started:
        until(lambda: steps_of(out) > 2)
        for rank in who:
            started[rank].kill(number)
        assert [rank.status(60) for rank in started] == [STOPPED_STATUS] * processes, started[0].text
    stopped = json.loads((out / STOPPED).read_text())
    step = stopped["step"]
    assert 2 < step < STEPS and stopped == {"step": step, "num_steps": STEPS, "signal": number.name}
    state = read_state(out)
    assert state is not None and (state.state, state.step, state.reason) == ("stopped", step, number.name)
    assert f"stopped by {number.name}: {step} of {STEPS} steps are done" in started[0].text
    # Of those that got the signal the first says so, and the others nothing.
    left, by_one = r"(no step is|1 step is|\d+ steps are) left", rf"\(rank ({'|'.join(map(str, who))})\)"
    shown = "".join(rank.text for rank in started)
    for said in (f"{number.name}: the run is asked to stop", f"the run stops after step {step}: {left} for .*{by_one}"):
        assert len(re.findall(said, shown)) == 1, shown
    assert [path.name for path in complete_checkpoints(out)] == [f"checkpoint-{step}"]
    assert steps_of(out) == step and not list(out.glob("*.safetensors")) and not list(out.glob("*unfinished*"))
    log = to_the_end(tmp_path / "second", processes, [*arguments, "--resume_from_checkpoint", "latest"])[0].text
    assert f"after step {step}" in log and not (out / STOPPED).exists() and steps_of(out) == STEPS
    expected, got = weights(undisturbed(layout)), weights(out)
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name
    log = to_the_end(tmp_path / "third", processes, [*arguments, "--resume_from_checkpoint", "latest"])[0].text
    assert f"the run is finished: {out} has its model, after {STEPS} steps" in log


@pytest.mark.parametrize("layout", ["one process", "two processes", "replicas", "end to end"])
def test_an_evaluation_is_left_off(layout: str, inputs: Path, tmp_path: Path) -> None:
    """And its step is saved. A replica may be in the next steps already, which are made then."""
    processes, more = LAYOUTS[layout]
    more += f" --eval_file {inputs / 'rows.jsonl'} --eval_steps 2 --per_device_eval_batch_size 2"
    out = tmp_path / "out"
    with ranks(tmp_path, *[flags(inputs, out, more)] * processes, module="interrupted") as started:
        assert [rank.status(60) for rank in started] == [STOPPED_STATUS] * processes, started[0].text
    step = json.loads((out / STOPPED).read_text())["step"]
    assert step in ((4, 5, 6) if layout == "replicas" else (4,))
    assert [path.name for path in complete_checkpoints(out)] == [f"checkpoint-{step}"]
    last = [row for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if row["stage"] == 1]
    evaluated = [row["step"] for row in last if "eval_loss" in row]
    assert [row["step"] for row in last] == list(range(1, step + 1)) and evaluated == list(range(2, step, 2))


def test_an_evaluation_that_the_result_depends_on_is_made(inputs: Path, tmp_path: Path) -> None:
    more = f"--num_stages 2 --eval_file {inputs / 'rows.jsonl'} --eval_steps 2 --per_device_eval_batch_size 2"
    out, best = tmp_path / "out", " --save_steps 2 --load_best_model_at_end"
    with ranks(tmp_path, flags(inputs, out, more + best), module="interrupted") as started:
        assert started[0].status(60) == STOPPED_STATUS, started[0].text
    assert read_manifest(out / "checkpoint-4").eval_loss is not None


def test_without_checkpoints_it_says_what_is_lost(inputs: Path, tmp_path: Path) -> None:
    arguments = flags(inputs, tmp_path / "out", "--save_steps 0", steps=100_000)
    with ranks(tmp_path, arguments, arguments) as started:
        until(lambda: steps_of(tmp_path / "out") > 2)
        started[0].kill(signal.SIGTERM)
        assert [rank.status(60) for rank in started] == [STOPPED_STATUS] * 2
    assert "they are lost, since --save_steps 0 turns checkpoints off" in started[0].text
    assert not complete_checkpoints(tmp_path / "out")


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_interrupt_ends_it_at_once(second: signal.Signals, inputs: Path, tmp_path: Path) -> None:
    """Here while the first stage waits for the second one, which is stopped."""
    arguments = flags(inputs, tmp_path / "out", steps=100_000)
    with ranks(tmp_path, arguments, arguments) as started:
        until(lambda: steps_of(tmp_path / "out") > 2)
        started[1].kill(signal.SIGSTOP)
        started[0].kill(signal.SIGINT)
        until(lambda: "SIGINT: the run is asked to stop; another one ends it at once" in started[0].text)
        started[0].kill(second)
        assert started[0].status(15) == 128 + second
        assert f"stage 0 (rank 0) was ended by {second.name}" in started[0].text
