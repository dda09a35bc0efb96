"""Whether runs save, resume, fail and stop as they must, whatever happens to one of their processes."""

import math
import shutil
from pathlib import Path

from lopt_pp.checks.result import CheckFailed, Figures, NotHere, reason
from lopt_pp.checks.session import Ran, Session
from lopt_pp.checks.training import STEPS, compare, flags_of, records, train, weights
from lopt_pp.util.process import STOPPED_STATUS

SAVING = ("--save_steps", "2")

ENDLESS = ("--max_steps", "100000")


def resume(session: Session) -> Figures:
    """A run that goes on from a checkpoint ends like one that was not interrupted, all that runs beside it included."""
    evaluates = ("--eval_split_size", "8", "--eval_steps", "2", "--eval_on_start", "true")
    more = (*evaluates, "--probe_steps", "2", "--trace", "1-4")
    whole = train(session, "whole", session.topology, *SAVING, *more).succeeded()
    part = session.folder / "part" / "out"

    def copy() -> None:
        checkpoint = whole.folder / "out" / "checkpoint-4"
        if not checkpoint.is_dir():
            raise CheckFailed("a run with --save_steps 2 has left no checkpoint-4")
        shutil.copytree(checkpoint, part / "checkpoint-4")

    session.leader_says(copy)
    resumed = train(session, "part", session.topology, *SAVING, *more, "--resume_from_checkpoint", "latest")
    resumed.succeeded()

    def same() -> Figures:
        if "after step 4" not in resumed.text:
            raise CheckFailed("a run that was to go on from checkpoint-4 has not said so")
        if not any("eval_loss" in record for record in records(part)):
            raise CheckFailed("a run with --eval_steps 2 has measured no loss on the held-out rows")
        return compare(whole.folder / "out", part)

    return session.leader_says(same)


def restart(session: Session) -> Figures:
    """A process is killed, all are started again, and end as if nothing had happened."""
    ran = accident(session, "restart", "kill", SAVING, step=STEPS - 1, max_restarts=1)
    if ran.statuses.count(0) != session.processes:
        raise CheckFailed(f"a process was killed, and the run that was started again failed: {reason(ran.texts)}")
    whole = session.folder / "undisturbed" / "out"
    train(session, "undisturbed", session.topology).succeeded()
    return session.leader_says(lambda: compare(whole, ran.folder / "out"))


def kill(session: Session) -> Figures:
    """A process is killed: the others end, and say which."""
    ran = accident(session, "kill", "kill", ENDLESS)
    victim = session.processes - 1
    _ended(ran, "a process was killed")
    if f"(rank {victim}) has died" not in ran.text:
        raise CheckFailed(f"rank {victim} was killed, and the others did not say so, but: {reason(ran.texts)}")
    return {"said": f"rank {victim} has died"}


def hang(session: Session) -> Figures:
    """A process hangs: its neighbour gives it up after --stream_timeout, and says so."""
    if session.topology.num_processes == 1:
        raise NotHere("no stage of the layout waits for a message of another process")
    # Until the first message NCCL has much to do.
    seconds = 15.0 if session.backend == "nccl" else 4.0
    ran = accident(session, "hang", "hang", (*ENDLESS, "--stream_timeout", f"{seconds:g}"), rank=0)
    _ended(ran, "a process hung")
    if f"does not answer for {seconds:g} s" not in ran.text:
        raise CheckFailed(f"rank 0 hung for {seconds:g} s, and its neighbour did not say so, but: {reason(ran.texts)}")
    return {"given up after": f"{seconds:g} s"}


def not_finite(session: Session) -> Figures:
    """A loss of one stage is not finite: the run ends, and leaves the last good weights of all stages."""
    if session.topology.num_stages == 1:
        raise NotHere("the layout has no local head, which would be made to fail")
    # The local head explodes after its first step, while the block is hardly moved.
    more = ["--local_learning_rate", "1e-6", "--local_head_learning_rate", "1e30", "--max_grad_norm", "0"]
    ran = train(session, "not-finite", session.topology, *more, *ENDLESS)
    _ended(ran, "a loss was not finite")

    def good() -> Figures:
        left = ran.folder / "out" / "last_good"
        if not (left / "model.safetensors.index.json").exists():
            raise CheckFailed(f"a loss was not finite, and the last good weights were not saved: {reason(ran.texts)}")
        bad = [name for name, tensor in weights(left).items() if not math.isfinite(tensor.float().sum().item())]
        if bad:
            raise CheckFailed(f"a loss was not finite, and the weights that were saved are not either: {bad[0]}")
        return {"left": "the last good weights"}

    return session.leader_says(good)


def same_bits(session: Session) -> Figures:
    """Two runs with --full_determinism end with the same bits."""
    if session.backend != "nccl":
        raise NotHere("on CPUs every run has the same bits as it is")
    flags = ("--full_determinism", "true", "--dtype", "bfloat16")
    first = train(session, "bits-1", session.topology, *flags).succeeded()
    second = train(session, "bits-2", session.topology, *flags).succeeded()
    return session.leader_says(lambda: compare(first.folder / "out", second.folder / "out", atol=0.0))


def stop(session: Session) -> Figures:
    """SIGUSR1 at one process: all end with the status 75, and a checkpoint."""
    ran = accident(session, "stop", "stop", (*ENDLESS, "--save_steps", "100000"), rank=0)
    if set(ran.statuses) != {STOPPED_STATUS}:
        raise CheckFailed(
            f"after SIGUSR1 the processes ended with {ran.statuses} and not {STOPPED_STATUS}: {reason(ran.texts)}"
        )
    saved = session.leader_says(lambda: _checkpoint(ran.folder / "out"))
    return {"left": saved}


def accident(
    session: Session,
    name: str,
    what: str,
    more: tuple[str, ...],
    *,
    rank: int | None = None,
    step: int = 3,
    max_restarts: int = 0,
) -> Ran:
    """A run in which something happens to one process, by default the last, as it is about to end a step."""
    victim = session.processes - 1 if rank is None else rank
    flags = flags_of(session, session.folder / name / "out", session.topology, *more)
    arguments = [str(victim), str(step), what, *flags]
    return session.run(name, arguments, entry="train_until", max_restarts=max_restarts)


def _ended(ran: Ran, why: str) -> None:
    if "SIGALRM" in ran.signs:
        raise CheckFailed(f"{why}, and the others did not end (--keep DIR keeps the logs, with where each was)")
    if 0 in ran.statuses:
        raise CheckFailed(f"{why}, and the run ended as if nothing had happened")


def _checkpoint(out: Path) -> str:
    saved = sorted(path.parent.name for path in out.glob("checkpoint-*/manifest.json"))
    if not saved:
        raise CheckFailed("a run that was stopped has left no checkpoint")
    return saved[-1]
