"""What happens to runs on clusters, each done to a run of its own."""

import json
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from faults.testbed import NEXT_DAY, SAVE_STEPS, STAGES, STEPS, Ended, LostError, Testbed
from ranks import Rank

from lopt_pp.checkpoint.output_dir import STOPPED, complete_checkpoints, holds_whole_model

Fault = Callable[[Testbed, random.Random], tuple[str, Ended]]
"""Starts a run and does something to it; what, in words, and how the run ended."""


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


def edit_the_rows(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    """Edits the training file between the stop and the resume, which must be refused; then takes that back."""
    step = draw.randrange(SAVE_STEPS + 1, STEPS - 1)
    ended = signal_stage(testbed, signal.SIGKILL, draw.randrange(STAGES), at_step(testbed, step))
    kept = testbed.checkpoints()
    content = testbed.rows.read_text()
    lines = content.splitlines(keepends=True)
    edited = draw.randrange(len(lines))
    row = json.loads(lines[edited])
    lines[edited] = json.dumps(row | {"answer": row["answer"][::-1] + "1"}) + "\n"
    testbed.rows.write_text("".join(lines))
    try:
        with testbed.by_hand(resume=True) as started:
            refused = testbed.end_of(started)
    finally:
        testbed.rows.write_text(content)
    if 0 in refused.statuses or str(testbed.rows) not in refused.error or "training rows" not in refused.error:
        raise LostError(f"a resume with edited rows left with {refused.statuses}: {refused.text}")
    if testbed.checkpoints() != kept:
        raise LostError(f"a resume that was refused has left {testbed.checkpoints()} of the checkpoints {kept}")
    return f"row {edited + 1} edited after stage was killed at step {step}", ended


def start_a_second_run(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    """In the output directory of a run that is under way: the second is refused, and the first does not notice."""
    step, resume = draw.randrange(1, STEPS // 2), draw.random() < 0.5
    with testbed.by_hand(edit="--stream_timeout 100") as started:
        is_under_way = testbed.reach(at_step(testbed, step), lambda: has_ended(started))
        started[0].kill(signal.SIGSTOP)  # It is there as long as the second one looks.
        with testbed.by_hand(resume) as second:
            refused = testbed.end_of(second)
        started[0].kill(signal.SIGCONT)
        ended = testbed.end_of(started)
    if not is_under_way:
        raise LostError(f"the run ended before the second one was started: {ended.text}")
    _check_refused(refused, "is in use by another run (process ")
    if ended.statuses != [0] * STAGES:
        raise LostError(f"the second run has disturbed the first: {ended.text}")
    return f"a second run{' with latest' if resume else ''} at step {step}", ended


def start_two_at_once(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    """One of the two runs, and the same one in all of its processes."""
    with testbed.by_hand() as first, testbed.by_hand() as second:
        ends = [testbed.end_of(first), testbed.end_of(second)]
    refused, ended = sorted(ends, key=lambda end: end.statuses, reverse=True)
    _check_refused(refused, "by another run")
    if ended.statuses != [0] * STAGES:
        raise LostError(f"neither of two runs came to its end: {ended.text}")
    return "two runs at once", ended


def edit_the_run(testbed: Testbed, draw: random.Random) -> tuple[str, Ended]:
    """What run.yaml says is changed between a run's end and its return from the queue, and changed back."""
    step, edit = draw.randrange(2 * SAVE_STEPS + 1, STEPS - 1), draw.choice(EDITS)
    ended = signal_stage(testbed, signal.SIGKILL, draw.randrange(STAGES), at_step(testbed, step))
    newest, damages = complete_checkpoints(testbed.out)[0] / "manifest.json", draw.random() < 0.5
    content = newest.read_bytes()
    if damages:  # So that the run looks for an older one.
        newest.unlink()
    before = testbed.contents()
    with testbed.by_hand(resume=True, edit=edit) as started:
        _check_refused(testbed.end_of(started), "is of another run: ")
    if testbed.contents() != before:
        raise LostError(f"a run that was refused has changed the output directory: {edit}")
    newest.write_bytes(content)
    return f"stage killed at step {step}, then {edit}{' and a damaged manifest' if damages else ''}", ended


def _check_refused(ended: Ended, reason: str) -> None:
    if 0 in ended.statuses or reason not in ended.error or ended.text.count("lopt-pp: error:") != 1:
        raise LostError(f"it was not refused in one line: {ended.statuses}: {ended.text}")


EDITS = (
    "--per_device_train_batch_size 8",
    "--gradient_accumulation_steps 4 --save_total_limit 1",
    "--seed 7 --save_total_limit 1",
    "--train_file {folder}/edited.jsonl",
    "--local_objective next_token",
)
"""Of the run's flags, each of which makes it another run."""

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
