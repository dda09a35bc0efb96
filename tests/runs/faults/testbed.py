"""Where the trials of the fault harness take place: runs of two stages, and the run that nothing happens to."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from launching import environment, torchrun
from ranks import Rank, ranks
from results import weights
from tiny import DATED, write_inputs, write_rows

from lopt_pp.checkpoint.manifest import read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.errors import LoptError

STEPS, SAVE_STEPS, STAGES = 40, 5, 2
DAY, NEXT_DAY = "2026-01-31", "2026-02-01"
PATIENCE = 120.0
"""Seconds that anything may take."""


class LostError(AssertionError):
    """A run that did not end as it should."""


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended.

    Attributes:
        statuses: their exit statuses; negative is the signal that killed one.
        text: what they have printed.
    """

    statuses: list[int]
    text: str

    @property
    def error(self) -> str:
        """The last error line; empty where there is none."""
        return ([""] + re.findall(r"lopt-pp: error: (.*)", self.text))[-1]


class Testbed:
    """Starts runs in an output directory that each trial has for itself.

    Attributes:
        out: the output directory at hand.
        days: what day it is for each stage; the chat template prints it.
        more: further flags, for the trial at hand.
        expected: the weights of the run that nothing happens to.
        checkpoint_bytes: the size of one of its checkpoints.
        rows: the training file.

    Args:
        folder: for everything.
    """

    __test__ = False  # pytest takes it for a class of tests by its name.

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rows = folder / "rows.jsonl"
        write_inputs(folder, attention_dropout=0.1)
        write_rows(folder / "edited.jsonl", seed=1)
        (folder / "dated.jinja").write_text(DATED)
        self.days, self.more = [DAY] * STAGES, list[str]()
        self.out = folder / "undisturbed"
        with self.by_hand() as started:
            ended = self.end_of(started)
        if ended.statuses != [0] * STAGES:
            raise LostError(f"the undisturbed run failed: {ended.text}")
        self.expected = weights(self.out)
        newest = complete_checkpoints(self.out)[0]
        self.checkpoint_bytes = sum(file.stat().st_size for file in newest.iterdir())

    def by_hand(self, resume: bool = False, edit: str = "") -> AbstractContextManager[list[Rank]]:
        """The run without a launcher, which would end one process when another ends.

        Args:
            resume: whether it goes on from the latest checkpoint.
            edit: other flags than it is otherwise started with.
        """
        given = [*self._flags(resume), *edit.format(folder=self._folder).split()]
        arguments = [[day, *given] for day in self.days]
        return ranks(self._folder / f"log-{time.monotonic_ns()}", *arguments, module="on_a_day")

    @contextmanager
    def by_torchrun(self, restarts: int = 0) -> Iterator["subprocess.Popen[str]"]:
        """The run under torchrun; whatever is left of it at the end is killed."""
        command = torchrun(STAGES, "-m", "on_a_day", DAY, *self._flags(resume=False))
        command.insert(command.index("--nproc-per-node"), f"--max-restarts={restarts}")
        log = self._folder / f"log-{time.monotonic_ns()}"
        with log.open("w") as file:
            launcher = subprocess.Popen(command, env=environment(), stdout=file, stderr=file, text=True)
        launcher.log = log  # type: ignore[attr-defined]
        try:
            yield launcher
        finally:
            launcher.kill()
            launcher.wait()
            for process in psutil.process_iter(["cmdline"]):
                if str(self.out) in (process.info["cmdline"] or ()):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()

    def _flags(self, resume: bool) -> list[str]:
        given = f"--model_name_or_path {self._folder / 'model'} --train_file {self.rows}"
        given += f" --chat_template_path {self._folder / 'dated.jinja'}"
        given += f" --output_dir {self.out} --max_steps {STEPS} --save_steps {SAVE_STEPS} --learning_rate 1e-3"
        given += " --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --stream_timeout 5"
        return [*given.split(), *self.more, *(["--resume_from_checkpoint", "latest"] if resume else [])]

    def steps_done(self) -> int:
        """The steps that all stages have made and told of."""
        path = self.out / "metrics.jsonl"
        return path.read_text().count(f'"stage": {STAGES - 1}') if path.exists() else -1

    def worker(self, launcher: "subprocess.Popen[str]", rank: int) -> psutil.Process:
        """The process of a rank under torchrun."""
        for process in psutil.Process(launcher.pid).children():
            with suppress(psutil.NoSuchProcess):
                if process.environ().get("RANK") == str(rank):
                    return process
        raise LostError(f"no process of rank {rank}")

    def reach(self, moment: Callable[[], object], ended: Callable[[], object]) -> bool:
        """Looks without a pause until the moment has come; False where the run has ended before."""
        deadline = time.monotonic() + PATIENCE
        while not moment():
            if ended():
                return False
            if time.monotonic() > deadline:
                raise LostError("the moment did not come")
        return True

    def end_of(self, run: "list[Rank] | subprocess.Popen[str]") -> Ended:
        """Waits until the run has ended by itself."""
        if isinstance(run, list):
            statuses = [rank.status(PATIENCE) for rank in run]
            return Ended(statuses, "".join(rank.text for rank in run))
        status = run.wait(PATIENCE)
        self.reach(lambda: not self._workers_left(), lambda: False)
        return Ended([status], run.log.read_text())  # type: ignore[attr-defined]

    def _workers_left(self) -> bool:
        """Whether a process of the run lives on without its launcher."""
        for pid in psutil.pids():
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if os.fsencode(self.out) in words and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                    return True
        return False

    def checkpoints(self) -> list[int]:
        """The steps of the complete checkpoints; all of them must be whole."""
        steps = []
        for path in complete_checkpoints(self.out):
            try:
                manifest = read_manifest(path)
                for spec in manifest.specs:
                    manifest.check_part(spec.stage)
            except LoptError as error:
                raise LostError(f"a complete checkpoint is not whole: {error}") from error
            steps.append(manifest.step)
        return steps

    def contents(self) -> dict[str, bytes]:
        """All files of the output directory but the lock, by their paths."""
        files = [path for path in self.out.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
        return {str(path.relative_to(self.out)): path.read_bytes() for path in files}

    def check_result(self) -> None:
        """Compares the model in the output directory with that of the run that nothing happened to."""
        got = weights(self.out)
        if got.keys() != self.expected.keys():
            raise LostError(f"the model in {self.out} has other tensors")
        for name, tensor in self.expected.items():
            if not torch.equal(got[name], tensor):
                raise LostError(f"{name} is not what it is in the run that nothing happened to")


def signal_stage(testbed: Testbed, number: signal.Signals, victim: int, moment: Callable[[], object]) -> Ended:
    """Sends a signal to one stage of a run without a launcher; one that hangs is killed when the others have left."""
    with testbed.by_hand() as started:
        if testbed.reach(moment, lambda: has_ended(started)) and started[victim].process.is_alive():
            started[victim].kill(number)
        if number == signal.SIGSTOP:
            testbed.end_of([rank for rank in started if rank is not started[victim]])
            started[victim].kill()
        return testbed.end_of(started)


def has_ended(started: list[Rank]) -> bool:
    return not any(rank.process.is_alive() for rank in started)


def at_step(testbed: Testbed, step: int) -> Callable[[], bool]:
    return lambda: testbed.steps_done() >= step
