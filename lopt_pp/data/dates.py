"""The date that a chat template prints: that of the run's start, on all its rows, in all its processes, for good.

Templates such as those of Llama 3.2 and gpt-oss write today's date into the system message. Rows that are tokenized the
next day would have other tokens, so a run could not go on from its checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime

from transformers import PreTrainedTokenizerBase

from lopt_pp.data.encoding import EncodedRow
from lopt_pp.data.formats import Row
from lopt_pp.util.compat_transformers import templates_see

Encoder = Callable[[Row], EncodedRow | None]
"""What `RowEncoder` is."""


def today() -> date:
    return datetime.now().date()


@dataclass(frozen=True)
class DatedEncoder:
    """Encodes rows on a day of the past, as far as chat templates can tell. A cache of its rows depends on the day.

    Attributes:
        encode: a row.
        day: that templates print; of the hour they see midnight.
    """

    encode: Encoder
    day: date

    def __call__(self, row: Row) -> EncodedRow | None:
        with templates_see(datetime.combine(self.day, datetime.min.time())):
            return self.encode(row)


def dated(encode: Encoder, tokenizer: PreTrainedTokenizerBase, day: date | None) -> Encoder:
    """The encoder of a run, which knows of its day only where the tokenizer's chat template asks for one.

    Args:
        encode: a row.
        tokenizer: of the model.
        day: of the run's start; None is today.
    """
    if "strftime_now" not in str(tokenizer.chat_template):  # There may be several templates.
        return encode
    return DatedEncoder(encode, day or today())
