"""From raw rows to the microbatches of each optimizer step."""

from lopt_pp.data.config import DataConfig
from lopt_pp.data.formats import IGNORE_INDEX, EncodedRow, RowEncoder
from lopt_pp.data.loading import TokenizedRows, load_rows
from lopt_pp.data.order import DataOrder, Microbatch, TokenCounts

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "DataOrder",
    "EncodedRow",
    "Microbatch",
    "RowEncoder",
    "TokenCounts",
    "TokenizedRows",
    "load_rows",
]
