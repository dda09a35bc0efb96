"""What all tests share: helper modules on the path, one thread, and inputs of a run.

One thread, so that equal runs are equal bit for bit.
"""

import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
# The root for `benchmarks`, where pytest is not run as a module from there.
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "runs"), str(TESTS.parent)]
torch.set_num_threads(1)
# Of the terminals that tests run programs in, wherever the tests run themselves.
os.environ["TERM"] = "xterm"
# Under nohup, or in the background of a script, they would be ignored, by programs that the tests run as well.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

from tiny import InputsWith, write_inputs  # noqa: E402


@pytest.fixture(scope="session")
def inputs_with(tmp_path_factory: pytest.TempPathFactory) -> InputsWith:
    """Gives a folder with `model` and `rows.jsonl` as asked for, the same one each time; nothing writes into it."""

    @functools.cache
    def folder(rows: int = 40, **changes: object) -> Path:
        return write_inputs(tmp_path_factory.mktemp("inputs"), rows, **changes)

    return folder


@pytest.fixture(scope="session")
def inputs(inputs_with: InputsWith) -> Path:
    """A folder with a model and rows, `model` and `rows.jsonl`; nothing writes into it."""
    return inputs_with()


@pytest.hookimpl(trylast=True)  # When other conftest.py files have marked theirs.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that the workers of pytest-xdist end at about the same time."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
