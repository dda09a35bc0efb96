"""Reads one block's tensors from a model's safetensors files, and writes them back as one shard of a whole model.

A process opens only the files that hold tensors of its own blocks and reads only those tensors.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.block import BlockModel
from lopt_pp.model.dtypes import as_saved
from lopt_pp.model.location import PICKLED, no_weights
from lopt_pp.model.partition import BlockSpec
from lopt_pp.util.compat_transformers import checkpoint_tensors, find_file
from lopt_pp.util.files import write_file

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By their names in safetensors files."""

_CPU = torch.device("cpu")


class PretrainedWeights:
    """The safetensors files of a model, in a local directory or on the Hugging Face hub.

    Args:
        name_or_path: a directory, or a hub id, as `from_pretrained` takes it.
        revision: of the hub repository.

    Raises:
        LoptError: there are no safetensors files, they cannot be fetched, or their index is unusable.
    """

    def __init__(self, name_or_path: str, revision: str = "main") -> None:
        self.name_or_path = name_or_path
        self._revision = revision
        self._stack: ExitStack | None = None
        self._open_files: dict[str, tuple[Any, frozenset[str]]] = {}
        if Path(name_or_path).is_file():
            raise LoptError(f"--model_name_or_path {name_or_path} is a file; give the model's directory")
        if self._find(SAFE_WEIGHTS_NAME) is not None:
            with self._open(SAFE_WEIGHTS_NAME) as file:
                self.files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
        elif (index := self._find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
            self.files = _read_index(Path(index))
        else:
            pickled = next((name for name in PICKLED if self._find(name) is not None), None)
            raise LoptError(f"--model_name_or_path {no_weights(name_or_path, pickled)}")

    def read(
        self, names: Sequence[str], device: torch.device = _CPU, dtype: torch.dtype | None = None
    ) -> dict[str, torch.Tensor]:
        """The named tensors.

        Args:
            names: of tensors.
            device: where they are put, each as soon as it is read.
            dtype: that they are cast to there; None for the stored ones.
        """
        tensors = {}
        for file_name in sorted({self.files[name] for name in names}):
            with self._opened(file_name) as (file, present):
                for name in names:
                    if self.files[name] != file_name:
                        continue
                    if name not in present:
                        raise LoptError(
                            f"{self.name_or_path}: the index puts {name} in {file_name}, which does not have it"
                        )
                    # Copied into torch's own aligned memory, so that no result hangs on where a tensor lay in a file.
                    try:
                        read = file.get_tensor(name).to(device)
                        tensors[name] = read.to(dtype=dtype or read.dtype, copy=device.type == "cpu")
                    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
                        # The last four: of a dtype that PyTorch does not have.
                        raise LoptError(
                            f"{self.name_or_path}: {file_name}: {name} cannot be read: {first_line(error)}"
                        ) from error
        return tensors

    def formats(self, names: Iterable[str]) -> dict[str, str]:
        """The stored dtypes of the named tensors as safetensors writes them: BF16, I8.

        Only the headers of the files are read that hold these tensors; one that is not in its file is left out.
        """
        found: dict[str, str] = {}
        names = list(names)
        for file_name in sorted({self.files[name] for name in names}):
            with self._opened(file_name) as (file, present):
                own = [name for name in names if self.files[name] == file_name and name in present]
                found |= {name: file.get_slice(name).get_dtype() for name in own}
        return found

    def dtypes(self, names: Iterable[str]) -> dict[str, torch.dtype | None]:
        """The stored dtypes of the named tensors; None of those that are not floating-point of 16 bits or more."""
        return {name: _DTYPES.get(format) for name, format in self.formats(names).items()}

    @contextmanager
    def kept_open(self) -> Iterator[None]:
        """While it lasts, each file is opened once, however often tensors are read from it."""
        with ExitStack() as self._stack:
            try:
                yield
            finally:
                self._stack, self._open_files = None, {}

    def _find(self, file_name: str) -> str | None:
        """The local path of a file (fetched from the hub if need be), or None where there is no such file."""
        try:
            return find_file(self.name_or_path, file_name, self._revision)
        except OSError as error:
            reason = " ".join(str(error).split())
            raise LoptError(
                f"--model_name_or_path {self.name_or_path}: {file_name} cannot be fetched: {reason}"
            ) from error

    @contextmanager
    def _opened(self, file_name: str) -> Iterator[tuple[Any, frozenset[str]]]:
        """A file and the names of the tensors in it."""
        if file_name in self._open_files:
            yield self._open_files[file_name]
            return
        with ExitStack() as own:
            file = (self._stack or own).enter_context(self._open(file_name))
            opened = file, frozenset(file.keys())
            if self._stack is not None:
                self._open_files[file_name] = opened
            yield opened

    def _open(self, file_name: str) -> safe_open:
        path = self._find(file_name)
        if path is None:
            raise LoptError(f"{self.name_or_path}: {file_name} is missing, though the index names it")
        try:
            # Read rather than mapped: pages of a mapping would count as resident memory until the file is closed.
            return safe_open(path, framework="pt", backend="pread")
        except (SafetensorError, OSError) as error:
            raise LoptError(f"{path} is not a whole safetensors file: {first_line(error)}; fetch it again") from error


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. File names that would leave the directory are refused."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in (*files, *files.values())):
            raise TypeError("names are not strings")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoptError(f"{path} is not a safetensors index with a weight_map of tensor names to file names") from error
    for file_name in set(files.values()):
        if Path(file_name).name != file_name or file_name in ("", ".", "..") or set(file_name) & {"\\", "\0"}:
            raise LoptError(f"{path} names the file {file_name!r}, which is not a plain file name beside it")
    return files


def shard_name(spec: BlockSpec) -> str:
    """The file name of a stage's shard, in the Hugging Face convention."""
    return f"model-{spec.stage + 1:05d}-of-{spec.num_stages:05d}.safetensors"


def write_shard(block: BlockModel, directory: Path | None, dtype: torch.dtype | None = None) -> dict[str, int]:
    """Writes the block's tensors, named and laid out as in the whole model's checkpoint, as its shard.

    Args:
        block: of which replicas may hold a shard each (FSDP2); then all of them must call this.
        directory: where to write; None on the replicas that only give their shards.
        dtype: of the written tensors; None for that of the pretrained model's.

    Returns:
        The size in bytes of each tensor, by name; nothing where nothing is written.
    """
    whole: dict[str, torch.Tensor] = {}
    every = dict(block.model.named_parameters(remove_duplicate=False)).keys()
    tied = every - dict(block.model.named_parameters()).keys()  # Each is there under its first name already.
    for name, tensor in block.model.state_dict().items():
        if name in tied:
            continue
        gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if directory is not None:
            # One after another: there may be no room for all of them twice.
            whole |= as_saved({name: gathered.detach().cpu()}, dtype, block.own_dtypes)
    if directory is None:
        return {}
    return save_shard(block.model, block.spec, whole, directory)


def save_shard(
    model: PreTrainedModel, spec: BlockSpec, state: Mapping[str, torch.Tensor], directory: Path
) -> dict[str, int]:
    """Writes a block's tensors as its shard.

    Args:
        model: of the block's class; its own tensors do not matter.
        spec: the block's place.
        state: the tensors, on the CPU, by the names that they have in the model.
        directory: where to write.

    Returns:
        The size in bytes of each tensor, by name.
    """
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint_tensors(model, state).items()}
    path = directory / shard_name(spec)
    write_file(path, lambda unfinished: save_file(tensors, unfinished, metadata={"format": "pt"}))
    return {name: tensor.nbytes for name, tensor in tensors.items()}


def write_index(
    shards: Mapping[str, Mapping[str, int]], directory: Path, metadata: Mapping[str, str | int] | None = None
) -> None:
    """Writes the index that joins the shards.

    Args:
        shards: the tensor sizes (bytes) of each shard file.
        directory: of the model.
        metadata: more for the index's own.
    """
    total_size = sum(size for sizes in shards.values() for size in sizes.values())
    index = {
        "metadata": {"total_size": total_size, **(metadata or {})},
        "weight_map": {name: file_name for file_name, sizes in shards.items() for name in sizes},
    }
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
