"""Finds the checkpoint that a run goes on from, and puts its stages where they were."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lopt_pp.checkpoint.compatibility import LEFT_OUT, in_words
from lopt_pp.checkpoint.manifest import Manifest, read_manifest
from lopt_pp.checkpoint.output_dir import complete_checkpoints
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError, shown
from lopt_pp.model.partition import BlockSpec

logger = logging.getLogger(__name__)

LATEST = "latest"


class Resumable(Protocol):
    """A stage, as far as going on is concerned; see `lopt_pp.stage.stage.Stage`."""

    index: int

    def resume(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None: ...

    def resume_weights(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None: ...


def resume(
    world: World,
    which: str | None,
    output_dir: Path,
    stages: Sequence[Resumable],
    specs: Sequence[BlockSpec],
    *,
    num_steps: int,
    must_match: Mapping[str, Any],
    may_change: Mapping[str, Any],
    checks_parts: bool,
) -> int:
    """Goes on from a checkpoint, on all processes from the same. All must call this.

    Args:
        world: this process.
        which: a checkpoint's directory; `latest` for the newest whole one; None to begin at the beginning. A run that
            torchrun starts again looks for the newest whole one first.
        output_dir: where the newest one is looked for.
        stages: of this process.
        specs: of all stages.
        num_steps: of the run.
        must_match: what the run must have in common with the checkpoint's, by name.
        may_change: what differences are warned of, by name.
        checks_parts: whether this process compares its parts with their checksums (one replica does).

    Returns:
        The number of steps done.

    Raises:
        LoptError: the checkpoint that `which` names cannot be gone on from.
    """
    if which is None and not world.is_restart:
        return 0
    candidates = [Path(which)] if which not in (None, LATEST) else []
    is_named = bool(candidates) and not world.is_restart
    if not is_named:
        if world.rank == 0:  # Which there are, all must see alike.
            world.store.set("candidates", json.dumps([path.name for path in complete_checkpoints(output_dir)]))
        candidates = [*(output_dir / name for name in json.loads(world.store.get("candidates"))), *candidates]
    # Each candidate is taken by all processes or by none: a part that one of them cannot read rules it out for all.
    for number, path in enumerate(candidates):
        manifest, problem = None, ""
        try:
            manifest = read_manifest(path)
            own = _check(manifest, stages, specs, num_steps, must_match, checks_parts)
        except LoptError as error:
            problem = str(error)
        problem = world.first_error(f"resume/{number}", problem)
        if not problem and manifest is not None:
            if world.rank == 0:
                _tell(manifest, specs, may_change)
            _go_on(manifest, own, stages, is_same_cut=manifest.specs == tuple(specs))
            return manifest.step
        if is_named:
            raise LoptError(f"--resume_from_checkpoint: {problem}")
        if world.rank == 0:
            logger.warning("%s; the checkpoint before it is tried", problem)
    if world.rank == 0:
        logger.info("no checkpoint in %s to go on from: the run begins at step 1", output_dir)
    return 0


def _check(
    manifest: Manifest,
    stages: Sequence[Resumable],
    specs: Sequence[BlockSpec],
    num_steps: int,
    must_match: Mapping[str, Any],
    checks_parts: bool,
) -> list[int]:
    """Returns the parts of a checkpoint that have layers of this process's stages.

    Raises:
        LoptError: the run cannot go on from it, or one of these parts is not whole.
    """
    for difference in _differences(manifest, must_match):
        raise LoptError(f"{manifest.directory} is of another run: {difference}")
    if manifest.step >= num_steps:
        raise LoptError(f"{manifest.directory} has done {manifest.step} steps, and the run has {num_steps}")
    if manifest.specs[-1].stop != specs[-1].stop:
        raise LoptError(f"{manifest.directory} is of a model of {manifest.specs[-1].stop} layers")
    own = parts_held(manifest, stages, specs)
    for part in own if checks_parts else ():
        manifest.check_part(part)
    return own


def parts_held(manifest: Manifest, stages: Sequence[Resumable], specs: Sequence[BlockSpec]) -> list[int]:
    """The parts of a checkpoint, however its model was cut, that have layers of these stages of `specs`."""
    own = [specs[stage.index] for stage in stages]
    return [part.stage for part in manifest.specs if any(s.start < part.stop and part.start < s.stop for s in own)]


def _tell(manifest: Manifest, specs: Sequence[BlockSpec], may_change: Mapping[str, Any]) -> None:
    logger.info("going on from %s, after step %d", manifest.directory, manifest.step)
    for difference in _differences(manifest, may_change):
        logger.warning("going on with another setting than before: %s", difference)
    if manifest.specs != tuple(specs):
        logger.warning("the model is cut otherwise than before: optimizer state and local heads start anew")


def _go_on(manifest: Manifest, own: Sequence[int], stages: Sequence[Resumable], is_same_cut: bool) -> None:
    parts = {part: manifest.read_part(part) for part in own}
    for stage in stages:
        if is_same_cut:
            stage.resume(parts[stage.index], manifest.step)
        else:
            weights = {name: tensor for part in parts.values() for name, tensor in part.items()}
            stage.resume_weights(weights, manifest.step)


def _differences(manifest: Manifest, run: Mapping[str, Any]) -> Iterator[str]:
    """What a run has otherwise than the one that wrote a checkpoint, in words."""
    for name, value in json.loads(json.dumps(run)).items():
        if (before := manifest.run.get(name, LEFT_OUT.get(name))) != value:
            yield f"{in_words(name)} is {shown(value)}, and was {shown(before)}"
