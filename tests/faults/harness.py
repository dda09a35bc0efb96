"""Does to real runs what happens to them on clusters, at random moments, and sees that none is lost.

    python tests/faults/harness.py [--trials 100] [--seed 0] [--kinds ...] [--output faults.json]

A trial starts a run of two stages, waits for a moment that is drawn from the seed, does something to the run, and sees
how it ends: well, or with one clear error. Every complete checkpoint must be whole then. If the run has not come to its
end, it is started once more with `--resume_from_checkpoint latest`. Its weights must be, bit for bit, those of the run
that nothing happened to.

Prints a table of how the trials ended, and writes every one to --output. Leaves with status 1 if one was lost.
`tests/faults/test_faults.py` is the short form.
"""

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # Where it is run by itself.

from faults.ground import SAVE_STEPS, STAGES, STEPS, Ended, Ground, LostError
from ranks import Rank

from lopt_pp.manifest import complete_checkpoints
from lopt_pp.run import STOPPED
from lopt_pp.saving import holds_whole_model
from lopt_pp.train import STOPPED_STATUS

Fault = Callable[[Ground, random.Random], tuple[str, Ended]]
"""Starts a run and does something to it; what, in words, and how the run ended."""


@dataclass(frozen=True)
class Trial:
    """What was done to a run, and how it ended.

    Attributes:
        kind: of what was done.
        number: of the trial.
        done: what was done, in words.
        ended: how the run ended.
        checkpoints: the steps of the complete ones that were there then.
        resumed: whether the run had to be started once more.
        lost: what is wrong; empty where nothing is.
    """

    kind: str
    number: int
    done: str
    ended: str
    checkpoints: list[int]
    resumed: bool
    lost: str = ""


def signal_stage(ground: Ground, number: signal.Signals, victim: int, moment: Callable[[], object]) -> Ended:
    """Sends a signal to one stage of a run without a launcher; one that hangs is killed when the others have left."""
    with ground.by_hand() as started:
        if ground.reach(moment, lambda: has_ended(started)) and started[victim].process.is_alive():
            started[victim].kill(number)
        if number == signal.SIGSTOP:
            ground.end_of([rank for rank in started if rank is not started[victim]])
            started[victim].kill()
        return ground.end_of(started)


def has_ended(started: list[Rank]) -> bool:
    return not any(rank.process.is_alive() for rank in started)


def at_step(ground: Ground, step: int) -> Callable[[], bool]:
    return lambda: ground.steps_done() >= step


def kill_a_stage(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), draw.randrange(1, STEPS - 1)
    return f"stage {victim} killed at step {step}", signal_stage(ground, signal.SIGKILL, victim, at_step(ground, step))


def kill_in_the_first_step(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim = draw.randrange(STAGES)
    ended = signal_stage(ground, signal.SIGKILL, victim, at_step(ground, 0))
    return f"stage {victim} killed in the first step", ended


def kill_in_the_last_step(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim = draw.randrange(STAGES)
    ended = signal_stage(ground, signal.SIGKILL, victim, at_step(ground, STEPS - 1))
    return f"stage {victim} killed in the last step", ended


def kill_during_a_save(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), SAVE_STEPS * draw.randrange(1, STEPS // SAVE_STEPS)
    unfinished = ground.out / f"checkpoint-{step}.unfinished"
    ended = signal_stage(ground, signal.SIGKILL, victim, unfinished.exists)
    return f"stage {victim} killed while checkpoint {step} is written", ended


def kill_while_the_model_is_saved(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim = draw.randrange(STAGES)
    ended = signal_stage(ground, signal.SIGKILL, victim, (ground.out / ".unfinished").exists)
    return f"stage {victim} killed while the model is saved", ended


def stop_a_stage(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), draw.randrange(1, STEPS - 5)
    return f"stage {victim} hangs at step {step}", signal_stage(ground, signal.SIGSTOP, victim, at_step(ground, step))


def ask_to_stop(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    victim, step = draw.randrange(STAGES), draw.randrange(1, STEPS)
    ended = signal_stage(ground, number, victim, at_step(ground, step))
    return f"{number.name} for stage {victim} at step {step}", ended


def restart_by_torchrun(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), draw.randrange(0, STEPS - 1)
    with ground.by_torchrun(restarts=1) as launcher:
        if ground.reach(at_step(ground, step), lambda: launcher.poll() is not None):
            ground.worker(launcher, victim).kill()
        ended = ground.end_of(launcher)
        if ended.statuses != [0]:
            raise LostError(f"torchrun --max-restarts 1 did not bring the run to its end: {ended.text}")
        return f"stage {victim} killed at step {step} under torchrun --max-restarts 1", ended


def kill_the_launcher(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    step = draw.randrange(0, STEPS - 1)
    with ground.by_torchrun() as launcher:
        if ground.reach(at_step(ground, step), lambda: launcher.poll() is not None):
            launcher.kill()
        return f"torchrun killed at step {step}", ground.end_of(launcher)


def stop_the_launcher(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    number, step = draw.choice([signal.SIGTERM, signal.SIGINT]), draw.randrange(1, STEPS - 1)
    with ground.by_torchrun(restarts=1) as launcher:
        if ground.reach(at_step(ground, step), lambda: launcher.poll() is not None):
            launcher.send_signal(number)
        ended = ground.end_of(launcher)
        if not (ground.out / STOPPED).exists() and not holds_whole_model(ground.out):
            raise LostError(f"torchrun's {number.name} did not stop the run in good order: {ended.text}")
        return f"{number.name} for torchrun at step {step}", ended


def fill_the_disk(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    size = int(ground.checkpoint_bytes * draw.uniform(0.3, 4.5))
    ground.out.mkdir()
    mount(ground.out, size)
    with ground.by_hand() as started:
        ended = ground.end_of(started)
    ground.checkpoints()
    mount(ground.out, 100 * ground.checkpoint_bytes, again=True)
    return f"a disk of {size / ground.checkpoint_bytes:.1f} checkpoints", ended


def lock_the_disk(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    """Makes the output directory read-only in mid-run."""
    step = draw.randrange(1, STEPS - 1)
    ground.out.mkdir()
    mount(ground.out, 100 * ground.checkpoint_bytes)
    with ground.by_hand() as started:
        ground.reach(at_step(ground, step), lambda: has_ended(started))
        # Which is refused while a file is open for writing.
        ground.reach(lambda: set_writable(ground.out, False), lambda: has_ended(started))
        ended = ground.end_of(started)
    ground.checkpoints()
    set_writable(ground.out, True)
    return f"the output directory is read-only from step {step} on", ended


def flip_a_byte(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    return _damage(ground, draw, cut=False)


def cut_a_file(ground: Ground, draw: random.Random) -> tuple[str, Ended]:
    return _damage(ground, draw, cut=True)


def _damage(ground: Ground, draw: random.Random, cut: bool) -> tuple[str, Ended]:
    """Kills a stage, then damages a file of the newest checkpoint; what is left must be found to be good."""
    step = draw.randrange(2 * SAVE_STEPS + 1, STEPS - 1)
    ended = signal_stage(ground, signal.SIGKILL, draw.randrange(STAGES), at_step(ground, step))
    newest = complete_checkpoints(ground.out)[0]
    file = draw.choice(sorted([*newest.glob("stage-*"), newest / "manifest.json"]))
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content) - 1)
    if cut:
        file.write_bytes(content[:place])
    else:
        content[place] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
    what = f"{'cut at' if cut else 'flipped a bit of'} byte {place} of {newest.name}/{file.name}"
    return f"stage killed at step {step}; {what}", ended


FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        kill_a_stage,
        kill_in_the_first_step,
        kill_in_the_last_step,
        kill_during_a_save,
        kill_while_the_model_is_saved,
        stop_a_stage,
        ask_to_stop,
        restart_by_torchrun,
        kill_the_launcher,
        stop_the_launcher,
        fill_the_disk,
        lock_the_disk,
        flip_a_byte,
        cut_a_file,
    )
}
DAMAGES = ("flip_a_byte", "cut_a_file")


def mount(path: Path, size: int, again: bool = False) -> None:
    """A file system of its own in memory, of `size` bytes at most."""
    options = f"remount,size={size}" if again else f"size={size}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True, capture_output=True)


def set_writable(path: Path, writable: bool) -> bool:
    """Lets a mounted file system be written, or not; whether that is so now."""
    options = f"remount,{'rw' if writable else 'ro'}"
    return subprocess.run(["mount", "-o", options, path], capture_output=True).returncode == 0


def reason_not_possible(kind: str, folder: Path) -> str:
    """Why a kind of fault cannot be tried here; empty where it can."""
    if kind not in ("fill_the_disk", "lock_the_disk"):
        return ""
    place = folder / "mount"
    place.mkdir(exist_ok=True)
    try:
        mount(place, 1 << 20)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no file system can be mounted here: {error}"
    subprocess.run(["umount", place], check=True)
    return ""


@contextmanager
def output(ground: Ground, kind: str, number: int) -> Iterator[None]:
    """Gives a trial an output directory of its own."""
    ground.out = ground.out.parent / f"{kind}-{number}"
    try:
        yield
    finally:
        if ground.out.is_mount():
            subprocess.run(["umount", ground.out], check=True)
        shutil.rmtree(ground.out, ignore_errors=True)


def run_trial(ground: Ground, kind: str, number: int, seed: int) -> Trial:
    """One trial; what is wrong with it is in its `lost`."""
    done, how, checkpoints, resumed = "", "", list[int](), False
    with output(ground, kind, number):
        try:
            done, ended = FAULTS[kind](ground, random.Random(f"{seed}/{kind}/{number}"))
            how = _check_end(ground, ended)
            # What has been damaged on purpose is not looked for here: the run that goes on must find it.
            checkpoints = ground.checkpoints() if kind not in DAMAGES else []
            resumed = how != "finished"
            if resumed:
                with ground.by_hand(resume=True) as started:
                    again = ground.end_of(started)
                if again.statuses != [0] * STAGES:
                    raise LostError(f"could not go on: {again.text}")
                if kind in DAMAGES and "the checkpoint before it is tried" not in again.text:
                    raise LostError(f"the damage was not found: {again.text}")
            ground.check_result()
        except AssertionError as error:
            return Trial(kind, number, done, how, checkpoints, resumed, lost=str(error))
    return Trial(kind, number, done, how, checkpoints, resumed)


def _check_end(ground: Ground, ended: Ended) -> str:
    """How a run ended, in words: well, stopped in good order, or with an error that says so without a traceback."""
    if (ground.out / STOPPED).exists():
        if not set(ended.statuses) <= {0, 1, STOPPED_STATUS}:
            raise LostError(f"a run that stopped in good order left with {ended.statuses}: {ended.text}")
        return "stopped in good order"
    if set(ended.statuses) == {0} or holds_whole_model(ground.out):
        return "finished"
    if re.search(r'^ *File ".*/lopt_pp/', ended.text, re.MULTILINE):
        raise LostError(f"a traceback: {ended.text}")
    if not ended.error:
        raise LostError(f"no error says why the run ended with {ended.statuses}: {ended.text}")
    return ended.error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=len(FAULTS), help="in all, of the kinds in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--output", type=Path, default=Path("faults.json"))
    given = parser.parse_args()
    trials = []
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        skipped = {kind: why for kind in given.kinds if (why := reason_not_possible(kind, Path(folder)))}
        kinds = [kind for kind in given.kinds if kind not in skipped]
        for number in range(given.trials):
            trial = run_trial(ground, kinds[number % len(kinds)], number, given.seed)
            print(f"{trial.kind} {number}: {trial.done}: {trial.lost or trial.ended}", flush=True)
            trials.append(trial)
    print(table(trials))
    for kind, why in skipped.items():
        print(f"{kind} was skipped: {why}")
    given.output.write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
    return int(any(trial.lost for trial in trials))


def table(trials: list[Trial]) -> str:
    """By kind, how many trials ended in which way."""
    lines = ["| kind | trials | finished by itself | stopped in good order | one clear error | resumed | lost |"]
    lines.append("|---" * 7 + "|")
    for kind in dict.fromkeys(trial.kind for trial in trials):
        own = [trial for trial in trials if trial.kind == kind]
        ended = Counter(
            trial.ended if trial.ended in ("finished", "stopped in good order") else "error" for trial in own
        )
        counts = [ended["finished"], ended["stopped in good order"], ended["error"]]
        counts += [sum(trial.resumed for trial in own), sum(bool(trial.lost) for trial in own)]
        lines.append(f"| {kind.replace('_', ' ')} | {len(own)} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
