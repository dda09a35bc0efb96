"""From the rows of a file to the microbatches of each optimizer step.

Knows tokenizers and files; no model and no processes.
Start at `loading.py`: `sources.py` reads rows, `formats.py` tells what they are, `encoding.py` makes tokens of them,
`sampler.py` deals them out.
"""

from lopt_pp.config.data import DataConfig
from lopt_pp.data.dataset import Rows, TokenizedRows
from lopt_pp.data.encoding import EncodedRow, RowEncoder
from lopt_pp.data.formats import IGNORE_INDEX
from lopt_pp.data.loading import load_rows, with_chat_template
from lopt_pp.data.microbatch import Microbatch
from lopt_pp.data.sampler import MicrobatchSampler, TokenCounts

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "MicrobatchSampler",
    "EncodedRow",
    "Microbatch",
    "RowEncoder",
    "Rows",
    "TokenCounts",
    "TokenizedRows",
    "load_rows",
    "with_chat_template",
]
