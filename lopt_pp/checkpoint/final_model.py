"""Writes the trained model: every stage its own shard, rank 0 what joins them. Nobody gathers the model.

Everything is written beside its place first and moved there when all of it is whole, the index last: a reader of the
output directory finds the whole new model, or what was there before.
"""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed import Store
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lopt_pp.checkpoint.output_dir import ModelOrigin, origin_as_metadata
from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.weights import shard_name, write_index, write_shard
from lopt_pp.stage.base import BaseStage
from lopt_pp.util.files import UNFINISHED, move_files

logger = logging.getLogger(__name__)

_HOW_ON = "checkpoints are as they were: free the disk, and --resume_from_checkpoint latest goes on from the newest"


def save_stage(stage: BaseStage, path: Path, store: Store, is_writer: bool, dtype: torch.dtype | None = None) -> None:
    """Writes the stage's shard beside its place and tells rank 0 what is in it.

    Args:
        stage: to save; of its replicas one writes, and where they hold a shard each, all must call this.
        path: the model's directory.
        store: of the run.
        is_writer: whether this replica writes.
        dtype: of the written weights; None for those of the pretrained model.
    """
    if not is_writer and not stage.is_sharded:
        return
    unfinished = path / UNFINISHED
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        with stage.averaged(), stage.updating, stage.side.reading():
            sizes = write_shard(stage.block, unfinished if is_writer else None, dtype)
            steps = stage.steps_done
    except (OSError, SafetensorError) as error:
        raise LoptError(f"stage {stage.index} cannot write its shard to {unfinished}: {error}; {_HOW_ON}") from error
    if is_writer:
        store.set(f"shard/{path.name}/{stage.index}", json.dumps([shard_name(stage.block.spec), sizes, steps]))


def finish_model(
    path: Path,
    store: Store,
    num_stages: int,
    describe: Callable[[Path], None],
    card: Callable[[Sequence[int]], str],
    origin: ModelOrigin,
    may_publish: Callable[[], None],
) -> None:
    """Joins the stages' shards to one model, and moves it to its place. For rank 0, once.

    Waits until every stage has written its shard. Where the directory is not shared between machines, the shards of the
    others stay on theirs (see `keep_shards`), and a warning names them.

    Args:
        path: the model's directory.
        store: of the run.
        num_stages: of the run.
        describe: writes all of the model but its weights into a directory.
        card: makes the model card's text from the number of steps that each stage has done.
        origin: the run that the model is of.
        may_publish: raises `LockLostError` where another run has the directory.

    Raises:
        LoptError: something cannot be written; what was in the directory is as it was.
    """
    unfinished = path / UNFINISHED
    parts = [json.loads(store.get(f"shard/{path.name}/{stage}")) for stage in range(num_stages)]
    shards = {name: sizes for name, sizes, _ in parts}
    try:
        describe(unfinished)
        (unfinished / "README.md").write_text(card([steps for *_, steps in parts]), "utf-8", "backslashreplace")
        write_index(shards, unfinished, origin_as_metadata(origin))
    except OSError as error:
        raise LoptError(f"the model cannot be written to {unfinished}: {first_line(error)}; {_HOW_ON}") from error
    may_publish()
    missing = [name for name in shards if not (unfinished / name).exists()]
    for old in (*path.glob("*.safetensors.index.json"), *path.glob("*.safetensors")):
        old.unlink()
    files = [file.name for file in unfinished.iterdir() if file.name != SAFE_WEIGHTS_INDEX_NAME]
    move_files(unfinished, path, [*files, SAFE_WEIGHTS_INDEX_NAME])
    store.set(f"finished/{path.name}", json.dumps(missing))
    if missing:
        logger.warning(
            "%s is not shared by all machines: copy %s there from the other machines", path, ", ".join(missing)
        )


def keep_shards(stages: Sequence[BaseStage], path: Path, store: Store) -> None:
    """Waits until rank 0 has joined the model; shards that its machine cannot see are put in place on this one."""
    missing = json.loads(store.get(f"finished/{path.name}"))
    own = [name for stage in stages if (name := shard_name(stage.block.spec)) in missing]
    move_files(path / UNFINISHED, path, own)
