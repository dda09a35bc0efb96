"""From raw rows to the microbatches of each optimizer step."""

from lopt_pp.data.config import DataConfig
from lopt_pp.data.formats import EncodedRow, RowEncoder
from lopt_pp.data.loading import load_rows, with_chat_template
from lopt_pp.data.microbatch import Microbatch
from lopt_pp.data.order import DataOrder, TokenCounts
from lopt_pp.data.rows import Rows, TokenizedRows
from lopt_pp.data.shapes import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "DataOrder",
    "EncodedRow",
    "Microbatch",
    "RowEncoder",
    "Rows",
    "TokenCounts",
    "TokenizedRows",
    "load_rows",
    "with_chat_template",
]
