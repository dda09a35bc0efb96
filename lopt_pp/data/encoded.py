"""A row as the model sees it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag

from lopt_pp.data.cutting import Span
from lopt_pp.data.formats import IGNORE_INDEX


class Note(IntFlag):
    """What an encoding has changed of a row, for counting."""

    TAIL_CUT = 1
    """The messages after the last answer that counts are left off: nothing in them is learned."""
    ONLY_LAST_ANSWER = 2
    """Earlier answers do not count: the chat template renders them otherwise once the conversation goes on."""
    NO_REASONING = 4
    """Earlier answers whose reasoning the chat template leaves out do not count."""
    CONTEXT_LOST = 8
    """A question, a system message or what a tool returned is not in the text as it is in the row."""
    RENDERED = 16
    """The prompt is one that the chat template has made already, and is not put through it again."""


@dataclass(frozen=True)
class EncodedRow:
    """One row as the model sees it.

    Attributes:
        input_ids: the token ids.
        labels: as long and aligned with `input_ids` (the loss shifts them), -100 where no loss counts.
        notes: what was changed on the way.
        unusable: why the row must not be trained on, for `2 left out (2 with an empty answer)`; empty where it may be.
        unused: the columns that nothing was made of, and `messages.KEY` of keys that the chat template does not read.
    """

    input_ids: list[int]
    labels: list[int]
    notes: Note = Note(0)
    unusable: str = ""
    unused: tuple[str, ...] = ()

    @property
    def num_targets(self) -> int:
        """The number of predicted tokens with a loss: of labels other than -100, after the first."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def make_labels(input_ids: Sequence[int], spans: Iterable[Span]) -> list[int]:
    """Labels of which those in the spans of tokens count."""
    labels = [IGNORE_INDEX] * len(input_ids)
    for start, stop in spans:
        labels[start:stop] = input_ids[start:stop]
    return labels
