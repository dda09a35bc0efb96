"""Does to real runs what happens to them on clusters, at random moments, and sees that none is lost.

    python tests/runs/faults/harness.py [--trials 100] [--seed 0] [--kinds ...] [--output faults.json]

A trial starts a run of two stages, waits for a moment that is drawn from the seed, does something to the run, and sees
how it ends: well, or with one clear error. Every complete checkpoint must be whole then. If the run has not come to its
end, it is started once more with `--resume_from_checkpoint latest`. Its weights must be, bit for bit, those of the run
that nothing happened to.

Prints a table of how the trials ended, and writes every one to --output. Leaves with status 1 if one was lost.
`tests/runs/faults/test_faults.py` is the short form.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # Where it is run by itself.
sys.path.insert(0, str(Path(__file__).parents[2] / "helpers"))

from faults.kinds import DAMAGES, FAULTS, reason_not_possible
from faults.testbed import DAY, STAGES, Ended, LostError, Testbed

from lopt_pp.checkpoint.output_dir import STOPPED, holds_whole_model
from lopt_pp.train import STOPPED_STATUS


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


@contextmanager
def output(testbed: Testbed, kind: str, number: int) -> Iterator[None]:
    """Gives a trial an output directory of its own."""
    testbed.out = testbed.out.parent / f"{kind}-{number}"
    try:
        yield
    finally:
        testbed.days, testbed.more = [DAY] * STAGES, []
        if testbed.out.is_mount():
            subprocess.run(["umount", testbed.out], check=True)
        shutil.rmtree(testbed.out, ignore_errors=True)


def run_trial(testbed: Testbed, kind: str, number: int, seed: int) -> Trial:
    """One trial; what is wrong with it is in its `lost`."""
    done, how, checkpoints, resumed = "", "", list[int](), False
    with output(testbed, kind, number):
        try:
            done, ended = FAULTS[kind](testbed, random.Random(f"{seed}/{kind}/{number}"))
            how = _check_end(testbed, ended)
            # What has been damaged on purpose is not looked for here: the run that goes on must find it.
            checkpoints = testbed.checkpoints() if kind not in DAMAGES else []
            resumed = how != "finished"
            if resumed:
                with testbed.by_hand(resume=True) as started:
                    again = testbed.end_of(started)
                if again.statuses != [0] * STAGES:
                    raise LostError(f"could not go on: {again.text}")
                if kind in DAMAGES and "the checkpoint before it is tried" not in again.text:
                    raise LostError(f"the damage was not found: {again.text}")
            testbed.check_result()
        except AssertionError as error:
            return Trial(kind, number, done, how, checkpoints, resumed, lost=str(error))
    return Trial(kind, number, done, how, checkpoints, resumed)


def _check_end(testbed: Testbed, ended: Ended) -> str:
    """How a run ended, in words: well, stopped in good order, or with an error that says so without a traceback."""
    if (testbed.out / STOPPED).exists():
        if not set(ended.statuses) <= {0, 1, STOPPED_STATUS}:
            raise LostError(f"a run that stopped in good order left with {ended.statuses}: {ended.text}")
        return "stopped in good order"
    if set(ended.statuses) == {0} or holds_whole_model(testbed.out):
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
        testbed = Testbed(Path(folder))
        skipped = {kind: why for kind in given.kinds if (why := reason_not_possible(kind, Path(folder)))}
        kinds = [kind for kind in given.kinds if kind not in skipped]
        for number in range(given.trials):
            trial = run_trial(testbed, kinds[number % len(kinds)], number, given.seed)
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
