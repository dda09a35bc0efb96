"""Log lines on standard error, from one handler for this package and all libraries."""

import logging
import os
import sys

from lopt_pp.util.screen import is_terminal

_QUIET = ("transformers", "datasets", "httpx", "httpx2", "huggingface_hub", "torch.distributed")
"""Libraries that say only what is an error; those of HTTP would tell of each request to the hub."""


def quiet_libraries() -> None:
    """Leaves it to this package to say what goes on, but for errors."""
    for library in _QUIET:
        logging.getLogger(library).setLevel(logging.ERROR)


def set_up_logging(name: str) -> None:
    """Has this process log to standard error, in lines that say who speaks, and when where nobody looks on.

    What Python's `warnings` and the handlers of transformers and datasets would write by themselves goes the same way,
    so that nothing is written in parts. Their progress bars are off, but for those of datasets on a terminal in one
    process of a machine, while rows are prepared.

    Args:
        name: of this process.
    """
    import datasets
    import transformers

    looks = is_terminal(sys.stderr)
    form = f"[{name}] %(message)s" if looks else f"%(asctime)s [{name}] %(message)s"
    logging.basicConfig(format=form, datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO, force=True)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addFilter(_in_one_line)
    quiet_libraries()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    transformers.logging.disable_default_handler()
    transformers.logging.enable_propagation()
    datasets.logging.enable_propagation()
    if not looks or os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()


def _in_one_line(record: logging.LogRecord) -> bool:
    """Takes the line of code, and the end of a line, from one of Python's warnings."""
    text = record.getMessage().strip()
    record.msg, record.args = text.splitlines()[0] if text else "", ()
    return True
