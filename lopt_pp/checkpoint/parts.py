"""Reads the parts of a checkpoint tensor by tensor, so that nobody holds a part besides the stage that it goes into."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from lopt_pp.checkpoint.manifest import DamagedError, Manifest
from lopt_pp.errors import first_line
from lopt_pp.stage.state import LazyState

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of all that a stage's state has, by their names in safetensors files."""


class OpenParts(LazyState):
    """The tensors of some parts of a checkpoint, on the CPU: each is read whenever it is asked for, and not kept.

    The files are open as long as the context lasts.

    Args:
        manifest: of the checkpoint.
        stages: the numbers of the parts.
        prefix: of the names of the tensors that are wanted.

    Raises:
        DamagedError: a file is not a safetensors file, or a tensor cannot be read.
    """

    def __init__(self, manifest: Manifest, stages: Sequence[int], prefix: str = "") -> None:
        self._places: dict[str, tuple[Path, Any]] = {}
        self._stack = ExitStack()
        with ExitStack() as stack:
            for path in map(manifest.path, stages):
                try:
                    # Read rather than mapped: pages of a mapping would count as resident memory.
                    file = stack.enter_context(safe_open(path, framework="pt", backend="pread"))
                    names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                except (SafetensorError, OSError, RuntimeError) as error:
                    raise _damaged(path, error) from error
                self._places |= dict.fromkeys(names, (path, file))
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._stack.close()
        self._places = {}

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __getitem__(self, name: str) -> torch.Tensor:
        path, file = self._places[name]
        try:
            return file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:  # The last of a dtype that torch does not know.
            raise _damaged(path, error) from error

    def described(self, name: str) -> torch.Tensor:
        path, file = self._places[name]
        try:
            header = file.get_slice(name)
            dtype = _DTYPES.get(header.get_dtype())
            # One of a dtype that no state has is read: whoever needs it says what is wrong with it.
            return self[name] if dtype is None else torch.empty(header.get_shape(), dtype=dtype, device="meta")
        except (SafetensorError, OSError, RuntimeError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{path} is not a whole safetensors file: {first_line(error)}")
