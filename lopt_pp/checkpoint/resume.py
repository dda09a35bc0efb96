"""Finds the checkpoint that a run goes on from, and puts its stages where they were.

Only damage makes a run pass over a checkpoint. One that is whole and of another run ends the start with an error, while
all is still as it was: to begin at step 1 beside it would cost that run its metrics, and its checkpoints in time.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lopt_pp.checkpoint.compatibility import LEFT_OUT, TRAIN_FILES, difference, length_matters
from lopt_pp.checkpoint.manifest import TRAIN_ROWS, DamagedError, Manifest, read_manifest
from lopt_pp.checkpoint.output_dir import LATEST, complete_checkpoints, earlier_run, holds_whole_model, model_origin
from lopt_pp.checkpoint.parts import OpenParts
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError
from lopt_pp.model.partition import BlockSpec

logger = logging.getLogger(__name__)

_WHAT_TO_DO = (
    "give the flags and rows as they were, or another --output_dir; --overwrite_output_dir without "
    "--resume_from_checkpoint begins anew in place of what is there"
)


class Resumable(Protocol):
    """A stage, as far as going on is concerned; see `lopt_pp.stage.stage.Stage`."""

    index: int

    def resume(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None: ...

    def resume_weights(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None: ...


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        run_id: of the run: that of its checkpoint, or a new one.
        manifest: of the checkpoint; None where the run begins at step 1.
    """

    run_id: str
    manifest: Manifest | None = None

    @property
    def steps_done(self) -> int:
        """By the run so far."""
        return 0 if self.manifest is None else self.manifest.step

    def load(self, stages: Sequence[Resumable], specs: Sequence[BlockSpec]) -> None:
        """Puts the stages of a process where they were.

        Args:
            stages: of this process.
            specs: of all stages.

        Raises:
            DamagedError: a part of the checkpoint cannot be read.
        """
        if self.manifest is not None:
            own = parts_held(self.manifest, [stage.index for stage in stages], specs)
            _go_on(self.manifest, own, stages, is_same_cut=self.manifest.specs == tuple(specs))


@dataclass(frozen=True)
class Wanted:
    """The run that is to go on.

    Attributes:
        which: a checkpoint's directory; `latest` for the newest whole one; None to begin at the beginning. A run that
            torchrun starts again looks for the newest whole one that it has written first.
        output_dir: where the newest one is looked for.
        overwrites: whether checkpoints of other runs there are in no one's way.
        num_steps: of the run.
        must_match: what the run must have in common with the checkpoint's, by name.
        may_change: what differences are warned of, by name.
        digest_without: the digest of the training rows, as far as it does not depend on what these hold.
        source: where its training rows are from, for messages.
    """

    which: str | None
    output_dir: Path
    overwrites: bool
    num_steps: int
    must_match: Mapping[str, Any]
    may_change: Mapping[str, Any]
    digest_without: Callable[[Sequence[int]], str]
    source: str


def find_start(
    world: World, wanted: Wanted, stages: Sequence[int], specs: Sequence[BlockSpec], checks_parts: bool
) -> Start:
    """Finds where a run begins, the same on all processes, and changes nothing. All must call this.

    Args:
        world: this process.
        wanted: the run.
        stages: numbers of this process's stages.
        specs: of all stages.
        checks_parts: whether this process compares its parts with their checksums (one replica does).

    Raises:
        LoptError: a checkpoint is of another run, is the one that was named and damaged, or none is whole.
    """
    which = wanted.which
    if which is None and not world.is_restart:
        return Start(world.launch)
    is_named = which not in (None, LATEST) and not world.is_restart
    candidates = [Path(which)] if which not in (None, LATEST) else []
    if not is_named:
        names, problem = world.from_rank_0("candidates", lambda: _candidates(world, wanted))
        if problem:
            raise LoptError(problem)
        candidates = [*(wanted.output_dir / name for name in names), *candidates]
    run_id: str | None = None
    # Each candidate is taken by all processes or by none: a part that one of them cannot read rules it out for all.
    for number, path in enumerate(candidates):
        manifest, refused, damaged = None, "", ""
        try:
            manifest = read_manifest(path)
            refused = _reason_against(manifest, wanted, run_id, specs, is_named)
            run_id = run_id or manifest.run_id
            for part in parts_held(manifest, stages, specs) if checks_parts and not refused else ():
                manifest.check_part(part)
        except DamagedError as error:
            damaged = str(error)
        except LoptError as error:
            refused = str(error)
        if refused := world.first_error(f"resume/{number}/refused", refused):
            raise LoptError(f"--resume_from_checkpoint: {refused}")
        damaged = world.first_error(f"resume/{number}/damaged", damaged)
        if not damaged and manifest is not None:
            if world.rank == 0 and not _has_model(wanted):
                _tell(manifest, specs, wanted)
            return Start(manifest.run_id or world.launch, manifest)
        if is_named:
            raise LoptError(f"--resume_from_checkpoint: {damaged}")
        if world.rank == 0:
            logger.warning("%s; the checkpoint before it is tried", damaged)
    if candidates:
        raise LoptError(
            f"--resume_from_checkpoint: no checkpoint in {wanted.output_dir} is whole; give another --output_dir, or "
            f"--overwrite_output_dir without --resume_from_checkpoint to begin anew"
        )
    if world.rank == 0:
        logger.info("no checkpoint in %s to go on from: the run begins at step 1", wanted.output_dir)
    return Start(world.launch)


def _candidates(world: World, wanted: Wanted) -> tuple[list[str], str]:
    """The names of the checkpoints to be tried, the newest first; and what speaks against trying any."""
    found: list[tuple[tuple[int, float], str, str | None]] = []
    for path in complete_checkpoints(wanted.output_dir):
        step = int(path.name.rsplit("-", 1)[1])
        try:
            manifest = read_manifest(path)
        except LoptError:  # It is said when its turn comes, which is the first.
            found.append(((2, step), path.name, world.launch))
            continue
        moment = (0, step) if manifest.committed is None else (1, manifest.committed)
        found.append((moment, path.name, manifest.run_id))
    found.sort(key=lambda one: one[0], reverse=True)
    if wanted.which == LATEST:
        return [name for _, name, _ in found], ""
    # A run that torchrun starts again goes on from its own; at its first start it has seen to the others, or not
    # come so far.
    own, named = {world.launch}, None
    if wanted.which is not None:
        named = read_manifest(Path(wanted.which))
        own.add(named.run_id or world.launch)
    foreign = [name for _, name, run_id in found if run_id not in own]
    is_named = named is not None and named.directory.resolve().parent == wanted.output_dir.resolve()
    if foreign and not wanted.overwrites and not is_named:
        return [], earlier_run(wanted.output_dir, foreign[0])
    return [name for _, name, run_id in found if run_id in own], ""


def _reason_against(
    manifest: Manifest, wanted: Wanted, run_id: str | None, specs: Sequence[BlockSpec], is_named: bool
) -> str:
    """Why a run cannot go on from a checkpoint, however whole it is; empty where it can."""
    directory, step, num_steps = manifest.directory, manifest.step, wanted.num_steps
    must_match = wanted.must_match
    if rows := manifest.unusable_rows:  # They may have been mended, and the files with them.
        others = {name: value for name, value in must_match.items() if name != TRAIN_FILES}
        must_match = {**others, TRAIN_ROWS: wanted.digest_without(rows)}
    for name, text in _named_differences(manifest, must_match):
        of_rows = f" (of {wanted.source}, which may have changed)" if name in (TRAIN_ROWS, TRAIN_FILES) else ""
        return f"{directory} is of another run: {text}{of_rows}; {_WHAT_TO_DO}"
    if manifest.specs[-1].stop != specs[-1].stop:
        return f"{directory} is of a model of {manifest.specs[-1].stop} layers"
    if run_id is not None and manifest.run_id not in (run_id, None):
        return f"{directory} is of another run than the damaged ones after it; name the one to go on from"
    if step > num_steps or (is_named and step == num_steps):
        return (
            f"{directory} has done {step} steps, and the run has {num_steps}; with more (--max_steps or "
            f"--num_train_epochs) it goes on, and `lopt-pp export` makes the model of a checkpoint"
        )
    return ""


def parts_held(manifest: Manifest, stages: Sequence[int], specs: Sequence[BlockSpec]) -> list[int]:
    """The parts of a checkpoint, however its model was cut, that have layers of the stages of these numbers."""
    own = [specs[stage] for stage in stages]
    return [part.stage for part in manifest.specs if any(s.start < part.stop and part.start < s.stop for s in own)]


def _has_model(wanted: Wanted) -> bool:
    """Whether the run's model, of as many steps, is there already; see `lopt_pp.checkpoint.finished`."""
    if wanted.overwrites or not holds_whole_model(wanted.output_dir):
        return False
    origin = model_origin(wanted.output_dir)
    return origin is None or origin.num_steps == wanted.num_steps


def _tell(manifest: Manifest, specs: Sequence[BlockSpec], wanted: Wanted) -> None:
    logger.info("going on from %s, after step %d", manifest.directory, manifest.step)
    for name, text in _named_differences(manifest, wanted.may_change):
        if name != "num_steps":
            logger.warning("going on with another setting than before: %s", text)
        elif length_matters(wanted.may_change):
            logger.warning(
                "going on with another setting than before: %s; --lr_scheduler_type %s follows the new number, so the "
                "weights end otherwise than those of a run that had it from the start",
                text,
                wanted.may_change["lr_scheduler_type"],
            )
        else:
            logger.info("%s", text)
    if manifest.specs != tuple(specs):
        logger.warning("the model is cut otherwise than before: optimizer state and local heads start anew")


def _go_on(manifest: Manifest, own: Sequence[int], stages: Sequence[Resumable], is_same_cut: bool) -> None:
    for stage in stages:
        with OpenParts(manifest, [stage.index] if is_same_cut else own) as parts:
            if is_same_cut:
                stage.resume(parts, manifest.step)
            else:
                stage.resume_weights(parts, manifest.step)


def _named_differences(manifest: Manifest, run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a run has otherwise than the one that wrote a checkpoint, by name, and in words."""
    for name, value in json.loads(json.dumps(run)).items():
        if name == TRAIN_FILES and name not in manifest.run:
            continue
        if text := difference(name, value, manifest.run.get(name, LEFT_OUT.get(name))):
            yield name, text
