"""When a run's checkpoints are pushed, by processes of their own: here by a program that waits until it may end."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lopt_pp.distributed.shutdown import RunLength
from lopt_pp.hub.pusher import Pusher
from lopt_pp.hub.repository import Repository

MakePusher = Callable[..., Pusher]


class Program:
    """What is started in place of Python: it notes its arguments, waits for a word, and says it.

    Attributes:
        calls: has the arguments of each.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.calls, self._words = folder / "program", folder / "calls", folder / "words"
        self._words.mkdir()
        for step in (2, 4, 6):
            os.mkfifo(self._words / f"checkpoint-{step}")
        self.path.write_text(
            f'#!/bin/sh\necho "$@ token=$HF_TOKEN gpus=$CUDA_VISIBLE_DEVICES" >> {self.calls}\n'
            f'test -f "$4/README.md" || exit 3\nread -r word < {self._words}/$(basename "$4")\n'
            f'echo "$word"\ntest "$word" = ok\n'
        )
        self.path.chmod(0o755)

    def word(self, step: int) -> Path:
        """A pipe: whoever opens it to write waits until the program has come so far that it reads."""
        return self._words / f"checkpoint-{step}"

    def end(self, step: int, word: str) -> None:
        """Lets the push of a step end, with status 0 where the word is `ok`."""
        self.word(step).write_text(f"{word}\n")


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    made = Program(tmp_path)
    monkeypatch.setattr("sys.executable", str(made.path))
    return made


@pytest.fixture
def make(tmp_path: Path) -> MakePusher:
    """A pusher of a run of 9 steps, with checkpoints after 2, 4 and 6."""
    for step in (2, 4, 6):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text(str(step))

    def pusher(strategy: str, always: bool = False) -> Pusher:
        repository = Repository("me/it", branch="next", token="hf_secret")
        return Pusher(repository, tmp_path / "out", strategy, always, RunLength(9), lambda step: f"A card of {step}.")

    return pusher


def test_a_checkpoint_is_left_out_while_the_one_before_is_pushed(
    make: MakePusher, program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lopt_pp")
    pusher = make("checkpoint")
    pusher.saved(2)
    pusher.saved(4)
    program.end(2, "ok")
    pusher.wait()
    pusher.saved(6)
    program.end(6, "lopt-pp: error: it is full")
    pusher.wait()
    place = tmp_path / "out" / ".pushed.unfinished"
    line = f"-m lopt_pp.cli push {place}/checkpoint-{{0}} --hub_model_id me/it --hub_revision next"
    line += " --hub_strategy checkpoint --commit_message Training in progress, step {0} token=hf_secret gpus="
    assert program.calls.read_text().splitlines() == [line.format(step) for step in (2, 6)]
    assert "step 4 is not pushed: the push before it has not ended (see --hub_always_push)" in caplog.messages
    assert caplog.messages[-1] == "checkpoint-6 was not pushed: it is full. The run goes on"
    assert not place.exists() and "hf_secret" not in caplog.text


def test_each_is_pushed_in_turn_where_it_is_asked_for(make: MakePusher, program: Program, tmp_path: Path) -> None:
    """Also one that the run has removed meanwhile."""
    pusher = make("every_save", always=True)
    pusher.saved(2)
    pusher.saved(4)
    (tmp_path / "out" / "checkpoint-4" / "manifest.json").unlink()
    program.end(2, "ok")
    program.end(4, "ok")
    pusher.wait()
    assert [line.split()[3].rpartition("/")[2] for line in program.calls.read_text().splitlines()] == [
        "checkpoint-2",
        "checkpoint-4",
    ]


def test_those_at_the_end_and_those_that_are_gone_are_not(
    make: MakePusher, program: Program, caplog: pytest.LogCaptureFixture
) -> None:
    make("end").saved(2)
    pusher = make("every_save")
    pusher.saved(9)
    pusher.saved(3)
    pusher.wait()
    assert not program.calls.exists()
    assert [message.partition(": ")[0] for message in caplog.messages] == ["step 3 is not pushed"]


def test_a_run_that_fails_ends_the_push(make: MakePusher, program: Program, tmp_path: Path) -> None:
    pusher = make("every_save", always=True)
    pusher.saved(2)
    pusher.saved(4)
    with program.word(2).open("w"):  # It has come as far as to wait for its word, and gets none.
        pusher.abandon()
        pusher.wait()
    assert len(program.calls.read_text().splitlines()) == 1
    assert not (tmp_path / "out" / ".pushed.unfinished").exists()
