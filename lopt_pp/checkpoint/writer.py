"""Checkpoints of a training: every stage saves its own part when it comes to it, and a manifest makes the parts one.

Here the parts are written; `lopt_pp.checkpoint.committer` makes them one.

    OUTPUT_DIR/checkpoint-120/
        stage-00000-of-00002.safetensors    weights, local head and optimizer state of stage 0 after step 120
        stage-00001-of-00002.safetensors
        manifest.json                       what the parts are (sizes, checksums), and of which run
        config.json, tokenizer files        for `lopt-pp export`

Stages pass a step at different times, and none waits: what stage i has after step t is what the sequential algorithm
has then, whenever it is written. The parts go into `checkpoint-120.unfinished`; when all of them are whole, rank 0 adds
the manifest and renames the directory. So a directory of the right name is a complete checkpoint.

Nothing is pickled. Random state needs no saving: dropout and data order are functions of seed, stage and step.
"""

import functools
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch.distributed import Store

from lopt_pp.checkpoint.manifest import file_sha256, part_name
from lopt_pp.errors import first_line
from lopt_pp.model.dtypes import as_data
from lopt_pp.util.files import UNFINISHED, write_file
from lopt_pp.util.side_stream import Reading
from lopt_pp.util.threads import in_background

logger = logging.getLogger(__name__)


class Saveable(Protocol):
    """A stage, as far as a checkpoint is concerned."""

    index: int
    is_sharded: bool

    @property
    def own_dtypes(self) -> Mapping[str, torch.dtype]:
        """Of each parameter of its block, by the pretrained model's files."""

    def begin_copy(self, keeps: bool = True) -> tuple[dict[str, torch.Tensor], Reading]:
        """Copies, on the CPU, of all that the stage's next step depends on, and what tells when they are whole.

        Sharded replicas must all call this; those that do not write say so (`keeps`), and hold one tensor at a time.
        """


@dataclass(frozen=True)
class StageCopy:
    """What is written of a stage.

    Attributes:
        tensors: its state, on the CPU, by name.
        reading: tells when the tensors are whole.
        dtypes: of its parameters in the pretrained model's files, for the manifest.
    """

    tensors: Mapping[str, torch.Tensor]
    reading: Reading
    dtypes: Mapping[str, object]


def copied_key(step: int, stage: int) -> str:
    """What a writer leaves in the store when a stage has come to a checkpoint, and only its disk is waited for."""
    return f"copied/{step}/{stage}"


class PartWriter:
    """Writes the parts of this process's stages, in a thread; training goes on meanwhile.

    Args:
        output_dir: of the run.
        store: a connection to the run's store for the thread.
        num_stages: of the run.
        is_writer: whether this replica writes.
    """

    def __init__(self, output_dir: Path, store: Store, num_stages: int, is_writer: bool) -> None:
        self._output_dir = output_dir
        self._store = store
        self._num_stages = num_stages
        self._is_writer = is_writer
        self._thread: threading.Thread | None = None

    def save(self, stages: Sequence[Saveable], step: int) -> None:
        """Copies the stages' state and has it written; waits only while an earlier copy is still being written."""
        self.write(self.copy(stages), step)

    def copy(self, stages: Sequence[Saveable]) -> Mapping[int, StageCopy]:
        """Copies of the stages' state, for `write`; of a replica that does not write, nothing."""
        if not self._is_writer and not any(stage.is_sharded for stage in stages):
            return {}
        self.finish()  # Of two copies there is no need.
        own = {
            stage.index: StageCopy(*stage.begin_copy(self._is_writer), as_data(stage.own_dtypes)) for stage in stages
        }
        return own if self._is_writer else {}

    def write(self, copies: Mapping[int, StageCopy], step: int) -> None:
        """Has copies written, once those before them are."""
        if copies:
            self.finish()
            for stage in copies:
                self._store.set(copied_key(step, stage), "")
            self._thread = in_background(self._write, copies, step)

    def finish(self) -> None:
        """Waits until what was saved is written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, copies: Mapping[int, StageCopy], step: int) -> None:
        directory = self._output_dir / f"checkpoint-{step}{UNFINISHED}"
        for stage, copy in copies.items():
            path = directory / part_name(stage, self._num_stages)
            try:
                copy.reading.wait()
                directory.mkdir(parents=True, exist_ok=True)
                write_file(path, functools.partial(save_file, dict(copy.tensors)), sync=True)
                result = {"size": path.stat().st_size, "sha256": file_sha256(path), **copy.dtypes}
            except Exception as error:  # Whatever it is: the committer waits for word of this part.
                result = {"error": f"stage {stage}: {first_line(error)}"}
            self._store.set(f"part/{step}/{stage}", json.dumps(result))
