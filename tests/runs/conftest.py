"""Whole runs: each starts processes and trains, so all of these tests are slow."""

from pathlib import Path

import pytest

RUNS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if RUNS in item.path.parents:
            item.add_marker(pytest.mark.slow)
