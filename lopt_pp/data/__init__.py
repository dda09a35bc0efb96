"""From raw rows to the microbatches of each optimizer step."""

from lopt_pp.data.config import DataConfig
from lopt_pp.data.formats import EncodedRow, RowEncoder
from lopt_pp.data.loading import TokenizedRows, load_rows
from lopt_pp.data.order import DataOrder, Microbatch

__all__ = ["DataConfig", "DataOrder", "EncodedRow", "Microbatch", "RowEncoder", "TokenizedRows", "load_rows"]
