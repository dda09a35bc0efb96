"""What becomes of rows that are too long, where they are cut."""

from dataclasses import dataclass
from typing import Literal

TruncationMode = Literal["keep_start", "keep_end"]
"""Which end of a long row stays; see `DataConfig.truncation_mode`."""


@dataclass(frozen=True)
class Truncation:
    """What becomes of long rows.

    Attributes:
        max_length: tokens that stay.
        mode: whether these are the first or the last.
    """

    max_length: int
    mode: TruncationMode
