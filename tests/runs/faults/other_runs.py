"""Another run in the output directory of the first: at the same time, or in its place after an edit. It is refused."""

import json
import random
import signal

from faults.testbed import SAVE_STEPS, STAGES, STEPS, Ended, LostError, Testbed, at_step, has_ended, signal_stage

from lopt_pp.checkpoint.output_dir import complete_checkpoints


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
