"""The day of a run's start is that of the checkpoint that it goes on from."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path

import pytest

from lopt_pp.checkpoint.manifest import write_manifest
from lopt_pp.checkpoint.run_day import DAY, run_day
from lopt_pp.config.pipeline import PipelineConfig
from lopt_pp.distributed.world import World, connect

BEGUN, TODAY = date(2026, 1, 31), date(2026, 2, 1)


@pytest.fixture
def world() -> Iterator[World]:
    with connect(PipelineConfig()) as world:
        yield world


def write(directory: Path, run: dict[str, object], **more: object) -> Path:
    directory.mkdir(parents=True)
    parts = [{"size": 1, "sha256": "0" * 64}]
    write_manifest(directory, {"step": 6, "edges": [4], "run": run, "parts": parts, **more})
    return directory


def day(world: World, which: str | None, output_dir: Path) -> date:
    return run_day(world, which, output_dir, lambda: TODAY)


def test_a_run_that_begins_has_today(world: World, tmp_path: Path) -> None:
    assert day(world, None, tmp_path) == day(world, "latest", tmp_path) == TODAY
    assert day(world, str(tmp_path / "missing"), tmp_path) == TODAY
    write(tmp_path / "checkpoint-6", {DAY: BEGUN.isoformat()})
    assert day(world, None, tmp_path) == TODAY


def test_one_that_goes_on_has_that_of_the_newest_checkpoint_that_knows_it(world: World, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-6", {DAY: BEGUN.isoformat()})
    assert day(world, "latest", tmp_path) == day(world, str(tmp_path / "checkpoint-6"), tmp_path / "other") == BEGUN
    damaged = write(tmp_path / "checkpoint-8", {DAY: "2026-01-01"}) / "manifest.json"
    damaged.write_text(damaged.read_text().replace("2026", "2025"))
    write(tmp_path / "checkpoint-10", {})  # Of an earlier version.
    write(tmp_path / "checkpoint-12", {DAY: 7})
    assert day(world, "latest", tmp_path) == BEGUN
    write(tmp_path / "checkpoint-4", {DAY: "2025-07-01"}, committed=2.0)
    write(tmp_path / "checkpoint-14", {DAY: "2025-06-01"}, committed=1.0)
    assert day(world, "latest", tmp_path) == date(2025, 7, 1)
