"""From the rows of a file to the microbatches of each optimizer step.

Knows tokenizers and files; no model and no processes.
Start at `loading.py`: `sources.py` reads rows, `formats.py` tells what they are, `encoding.py` makes tokens of them,
`sampler.py` says which step takes which of them.
"""

import importlib
from typing import TYPE_CHECKING

from lopt_pp.config.data import DataConfig

if TYPE_CHECKING:
    from lopt_pp.data.ahead import MicrobatchesAhead
    from lopt_pp.data.dataset import Rows, TokenizedRows, UnusableRowsError
    from lopt_pp.data.encoding import EncodedRow, RowEncoder
    from lopt_pp.data.formats import IGNORE_INDEX
    from lopt_pp.data.limits import RowLimits
    from lopt_pp.data.loading import load_rows, with_chat_template
    from lopt_pp.data.microbatch import Microbatch
    from lopt_pp.data.sampler import MicrobatchSampler, TokenCounts

__all__ = [
    "IGNORE_INDEX",
    "DataConfig",
    "MicrobatchesAhead",
    "MicrobatchSampler",
    "EncodedRow",
    "Microbatch",
    "RowEncoder",
    "RowLimits",
    "Rows",
    "TokenCounts",
    "TokenizedRows",
    "UnusableRowsError",
    "load_rows",
    "with_chat_template",
]

_HOMES = {
    "IGNORE_INDEX": "lopt_pp.data.formats",
    "MicrobatchSampler": "lopt_pp.data.sampler",
    "MicrobatchesAhead": "lopt_pp.data.ahead",
    "EncodedRow": "lopt_pp.data.encoding",
    "Microbatch": "lopt_pp.data.microbatch",
    "RowEncoder": "lopt_pp.data.encoding",
    "RowLimits": "lopt_pp.data.limits",
    "Rows": "lopt_pp.data.dataset",
    "TokenCounts": "lopt_pp.data.sampler",
    "TokenizedRows": "lopt_pp.data.dataset",
    "UnusableRowsError": "lopt_pp.data.dataset",
    "load_rows": "lopt_pp.data.loading",
    "with_chat_template": "lopt_pp.data.loading",
}


def __getattr__(name: str) -> object:
    """Imports what is asked for only then: `lopt-pp submit` looks for files, and need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
