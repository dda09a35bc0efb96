"""Whatever goes wrong during a run ends it with one clear line and leaves nothing half-written."""

import json
import re
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import torch
from failing import LEFT, SETUP_SECONDS, error_of, failed, files, flags, steps_of
from launching import environment, torchrun
from ranks import ranks, until
from results import load_model
from safetensors.torch import load_file, save_file

from lopt_pp.metrics.state import read_state
from lopt_pp.report.state import StateReader


def loads(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of the saved model, all of them finite."""
    state = load_model(directory).state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    return state


def seen(output_dir: Path) -> str:
    """What the live page would say of the run."""
    state = StateReader(output_dir).read(None)
    assert state is not None
    return state.name


@pytest.mark.parametrize("module", ["lopt_pp.train", "nccl_worker"])
def test_a_first_stage_loss_that_is_not_finite(module: str, inputs: Path, tmp_path: Path) -> None:
    """Step and microbatch are named, and the weights of both stages from before are kept; over NCCL (imitated) while
    the second stage waits for a message that never comes."""
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
    given += ["--queue_depth", "1"] if module == "nccl_worker" else []
    with ranks(tmp_path, given, given, module=module) as started:
        error = failed(started)
    assert ("--queue_depth 1 is raised to 2" in started[0].text) == (module == "nccl_worker")
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


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_dies_is_named(victim: int, inputs: Path, tmp_path: Path) -> None:
    given = flags(inputs, tmp_path / "out")
    with ranks(tmp_path, given, given) as started:
        until(lambda: steps_of(tmp_path / "out") > 2, SETUP_SECONDS)
        assert seen(tmp_path / "out") == "training"
        started[victim].kill()
        other = started[1 - victim]
        assert other.status(15) == 1
        assert f"stage {victim} (rank {victim})" in error_of(other.text)
        assert "has died" in error_of(other.text)
    state = read_state(tmp_path / "out")
    assert state is not None and (state.state, state.process.is_alive()) == (
        "training" if victim == 0 else "failed",
        False,
    )
    assert victim == 0 or error_of(other.text) == f"lopt-pp: error: {state.reason}"
    assert seen(tmp_path / "out") == ("dead" if victim == 0 else "failed")
    # A process that is killed cannot let its lock go; the next run sees that it is gone.
    assert files(tmp_path / "out") == LEFT | ({".lock-1"} if victim == 0 else set())


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
