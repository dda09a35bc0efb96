"""What happens to runs on clusters, each done to a run of its own."""

import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from faults.other_runs import edit_the_rows, edit_the_run, start_a_second_run, start_two_at_once
from faults.testbed import (
    NEXT_DAY,
    SAVE_STEPS,
    STAGES,
    STEPS,
    Ended,
    LostError,
    Testbed,
    at_step,
    has_ended,
    signal_stage,
)

from lopt_pp.checkpoint.output_dir import STOPPED, complete_checkpoints, holds_whole_model

Fault = Callable[[Testbed, random.Random], tuple[str, Ended]]
"""Starts a run and does something to it; what, in words, and how the run ended."""


def kill_a_stage(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), draw.randrange(1, STEPS - 1)
    ended = signal_stage(testbed, signal.SIGKILL, victim, at_step(testbed, step))
    return f"stage {victim} killed at step {step}", ended


def kill_in_the_first_step(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim = draw.randrange(STAGES)
    ended = signal_stage(testbed, signal.SIGKILL, victim, at_step(testbed, 0))
    return f"stage {victim} killed in the first step", ended


def kill_in_the_last_step(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim = draw.randrange(STAGES)
    ended = signal_stage(testbed, signal.SIGKILL, victim, at_step(testbed, STEPS - 1))
    return f"stage {victim} killed in the last step", ended


def kill_during_a_save(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), SAVE_STEPS * draw.randrange(1, STEPS // SAVE_STEPS)
    unfinished = testbed.out / f"checkpoint-{step}.unfinished"
    ended = signal_stage(testbed, signal.SIGKILL, victim, unfinished.exists)
    return f"stage {victim} killed while checkpoint {step} is written", ended


def kill_while_the_model_is_saved(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim = draw.randrange(STAGES)
    ended = signal_stage(testbed, signal.SIGKILL, victim, (testbed.out / ".unfinished").exists)
    return f"stage {victim} killed while the model is saved", ended


def stop_a_stage(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), draw.randrange(1, STEPS - 5)
    return f"stage {victim} hangs at step {step}", signal_stage(testbed, signal.SIGSTOP, victim, at_step(testbed, step))


def ask_to_stop(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    number = draw.choice([signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    victim, step = draw.randrange(STAGES), draw.randrange(1, STEPS)
    ended = signal_stage(testbed, number, victim, at_step(testbed, step))
    return f"{number.name} for stage {victim} at step {step}", ended


def restart_by_torchrun(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    victim, step = draw.randrange(STAGES), draw.randrange(0, STEPS - 1)
    with testbed.by_torchrun(restarts=1) as launcher:
        if testbed.reach(at_step(testbed, step), lambda: launcher.poll() is not None):
            testbed.worker(launcher, victim).kill()
        ended = testbed.end_of(launcher)
        if ended.statuses != [0]:
            raise LostError(f"torchrun --max-restarts 1 did not bring the run to its end: {ended.text}")
        return f"stage {victim} killed at step {step} under torchrun --max-restarts 1", ended


def kill_the_launcher(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    step = draw.randrange(0, STEPS - 1)
    with testbed.by_torchrun() as launcher:
        if testbed.reach(at_step(testbed, step), lambda: launcher.poll() is not None):
            launcher.kill()
        return f"torchrun killed at step {step}", testbed.end_of(launcher)


def stop_the_launcher(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    number, step = draw.choice([signal.SIGTERM, signal.SIGINT]), draw.randrange(1, STEPS - 1)
    with testbed.by_torchrun(restarts=1) as launcher:
        if testbed.reach(at_step(testbed, step), lambda: launcher.poll() is not None):
            launcher.send_signal(number)
        ended = testbed.end_of(launcher)
        if not (testbed.out / STOPPED).exists() and not holds_whole_model(testbed.out):
            raise LostError(f"torchrun's {number.name} did not stop the run in good order: {ended.text}")
        return f"{number.name} for torchrun at step {step}", ended


def fill_the_disk(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    size = int(testbed.checkpoint_bytes * draw.uniform(0.3, 4.5))
    testbed.out.mkdir()
    mount(testbed.out, size)
    with testbed.by_hand() as started:
        ended = testbed.end_of(started)
    testbed.checkpoints()
    mount(testbed.out, 100 * testbed.checkpoint_bytes, again=True)
    return f"a disk of {size / testbed.checkpoint_bytes:.1f} checkpoints", ended


def lock_the_disk(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    """Makes the output directory read-only in mid-run."""
    step = draw.randrange(1, STEPS - 1)
    testbed.out.mkdir()
    mount(testbed.out, 100 * testbed.checkpoint_bytes)
    with testbed.by_hand() as started:
        testbed.reach(at_step(testbed, step), lambda: has_ended(started))
        # Which is refused while a file is open for writing.
        testbed.reach(lambda: set_writable(testbed.out, False), lambda: has_ended(started))
        ended = testbed.end_of(started)
    testbed.checkpoints()
    set_writable(testbed.out, True)
    return f"the output directory is read-only from step {step} on", ended


def go_on_the_next_day(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    """Midnight is past for a stage when the run starts, and for all of them when it goes on.

    Its rows are streamed, so that nothing is left of the day before in a cache.
    """
    victim, step = draw.randrange(STAGES), draw.randrange(SAVE_STEPS + 1, STEPS - 1)
    late = draw.randrange(1, STAGES)
    testbed.days[late], testbed.more = NEXT_DAY, ["--streaming"]
    ended = signal_stage(testbed, draw.choice([signal.SIGKILL, signal.SIGTERM]), victim, at_step(testbed, step))
    testbed.days = [NEXT_DAY] * STAGES
    return f"stage {victim} ended at step {step}; it goes on the next day", ended


def flip_a_byte(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    return _damage(testbed, draw, cut=False)


def cut_a_file(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    return _damage(testbed, draw, cut=True)


def _damage(testbed: Testbed, draw: random.Random, cut: bool) -> tuple[str, Ended]:
    """Kills a stage, then damages a file of the newest checkpoint; what is left must be found to be good."""
    step = draw.randrange(2 * SAVE_STEPS + 1, STEPS - 1)
    ended = signal_stage(testbed, signal.SIGKILL, draw.randrange(STAGES), at_step(testbed, step))
    newest = complete_checkpoints(testbed.out)[0]
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
        go_on_the_next_day,
        flip_a_byte,
        cut_a_file,
        edit_the_rows,
        start_a_second_run,
        start_two_at_once,
        edit_the_run,
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
