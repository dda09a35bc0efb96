"""Log lines of this package and of all libraries, from one handler."""

import io
import logging
import re
import sys
import warnings
from collections.abc import Iterator

import datasets
import pytest
import transformers

from lopt_pp.util.log_lines import set_up_logging


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def as_before() -> Iterator[None]:
    """Puts logging back as it was."""
    root, verbosity = logging.getLogger(), transformers.logging.get_verbosity()
    handlers, level = root.handlers[:], root.level
    yield
    logging.captureWarnings(False)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize(
    ("stream", "moment", "bars"), [(io.StringIO(), r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", False), (Terminal(), "", True)]
)
def test_all_writers_have_one_handler(
    stream: io.StringIO, moment: str, bars: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the time where nobody looks on; bars of datasets where somebody does."""
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("LOCAL_RANK", "0")
    set_up_logging("stage 1 (rank 1)")
    logging.getLogger("lopt_pp").info("a line")
    logging.getLogger("transformers.modeling").warning("not said")
    logging.getLogger("transformers.modeling").error("of transformers")
    logging.getLogger("datasets.arrow").error("of datasets")
    warnings.warn("careful", UserWarning, stacklevel=1)
    expected = ["a line", "of transformers", "of datasets", r"\S+test_log_lines.py:\d+: UserWarning: careful"]
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(expected), lines
    for line, text in zip(lines, expected, strict=True):
        assert re.fullmatch(rf"{moment}\[stage 1 \(rank 1\)\] {text}", line), lines
    assert datasets.are_progress_bars_disabled() is not bars
