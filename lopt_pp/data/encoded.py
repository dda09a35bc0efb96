"""A row as the model sees it."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntFlag

from lopt_pp.config.truncation import Truncation
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
    TRUNCATED = 32
    """It was longer than `--max_length`, and `--truncation_mode` has cut it."""


CHANGES = {
    Note.RENDERED: "with a prompt that the chat template has rendered already, which is used as it is",
    Note.TRUNCATED: "cut to --max_length by --truncation_mode",
    Note.TAIL_CUT: "without the messages after their last answer",
    Note.CONTEXT_LOST: "with messages that the chat template leaves out or changes",
    Note.NO_REASONING: "without a loss on earlier answers whose reasoning the chat template leaves out",
    Note.ONLY_LAST_ANSWER: "with a loss on their last answer only, as the chat template renders earlier ones otherwise",
}
"""What is said of rows with a note."""


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

    def truncated(self, to: Truncation | None) -> "EncodedRow":
        """The row, cut where it is too long, as `trl.trainer.sft_trainer` cuts it; noted in `notes`."""
        if to is None or len(self.input_ids) <= to.max_length:
            return self
        kept = slice(to.max_length) if to.mode == "keep_start" else slice(-to.max_length, None)
        return dataclasses.replace(
            self, input_ids=self.input_ids[kept], labels=self.labels[kept], notes=self.notes | Note.TRUNCATED
        )

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
