"""What is said of a message before it crosses a boundary."""

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields

import torch

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Header:
    """What a message is: the place of its microbatch in the run, and the shape and dtype of its hidden states."""

    step: int
    microbatch: int
    sequences: int
    tokens: int
    hidden: int
    dtype: int = 0
    """As a number; see `dtype_code`."""
    held_out: int = 0
    """Which microbatch of an evaluation it is, from 1, where the evaluation may end early; otherwise 0."""
    finishes: int = 0
    """1 in the first message of a step with which the run finishes early; otherwise 0."""
    besides: int = 0
    """In the first message of a step, what is done after it besides what flags say: see `RunLength.besides`."""

    @classmethod
    def end(cls, step: int, held_out: int = 0) -> "Header":
        """What comes after the last message, in place of the first one of `step`, which is not made.

        Args:
            step: that is not made; or, where `held_out` is not 0, that is the last, and whose evaluation ends early.
            held_out: the first microbatch of the evaluation that is not made.
        """
        return cls(step, -1, 0, 0, 0, held_out=held_out)

    @property
    def place(self) -> tuple[int, int]:
        """Its step and `held_out`: what a run may stop before, in the order in which it is made."""
        return self.step, self.held_out

    @property
    def may_be_end(self) -> bool:
        """Whether the end may come in place of it."""
        return self.microbatch == 0 or self.held_out > 0

    @property
    def is_end(self) -> bool:
        return self.microbatch == -1

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.sequences, self.tokens, self.hidden

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @classmethod
    def buffer(cls) -> torch.Tensor:
        """Memory for a packed one that is received."""
        return torch.empty(len(fields(cls)), dtype=torch.int64)

    def pack(self) -> torch.Tensor:
        return torch.tensor(astuple(self), dtype=torch.int64)

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "Header":
        return cls(*packed.tolist())

    def __str__(self) -> str:
        if self.is_end:
            in_evaluation = f"in the evaluation after step {self.step + 1}"
            return f"the end {in_evaluation if self.held_out else f'after step {self.step}'}"
        dtype = str(self.torch_dtype).removeprefix("torch.") if 0 <= self.dtype < len(_DTYPES) else "unknown"
        shape = f"[{self.sequences}, {self.tokens}, {self.hidden}]"
        return f"step {self.step + 1}, microbatch {self.microbatch + 1}, {shape} {dtype}"


def dtype_code(dtype: torch.dtype) -> int:
    """The number that means `dtype` in a header."""
    return _DTYPES.index(dtype)


def with_end(headers: Iterable[Header | None]) -> Iterator[Header | None]:
    """The headers of a run, and then the end.

    A None among them says that the shape of the next message is not known yet; see `HeaderQueue`.
    """
    step = 0
    for header in headers:
        yield header
        if header is not None:
            step = header.step + 1
    yield Header.end(step)


class HeaderQueue:
    """The headers of a run, one after another, of which the next one may have to be waited for.

    Mostly every header follows from the data order. But a step may have messages whose shapes depend on what the model
    has done before: completions that it generates are as long as they turn out. Then the iterator gives None until
    their shapes are known, and is asked again later.

    Args:
        headers: of every message in order; None as often as it is asked for one whose shape is not known yet.
    """

    def __init__(self, headers: Iterable[Header | None]) -> None:
        self._headers = with_end(headers)
        self._next: Header | None = None
        self.is_over = False
        """Whether the end has been taken."""

    def peek(self) -> Header | None:
        """The next header; None where it is not known yet, or the end has been taken."""
        if self._next is None and not self.is_over:
            self._next = next(self._headers)
        return self._next

    def take(self) -> Header:
        """Takes the header that `peek` has just shown."""
        header, self._next = self._next, None
        assert header is not None, "a header was taken that is not known yet"
        self.is_over = header.is_end
        return header
