"""Runs that are to fail, and what they say and leave."""

import re
from pathlib import Path

from ranks import Rank

LEFT = {"metrics.jsonl", "run.json", "state.json"}
"""What a run leaves that has failed: what it was, how far it came, and why it ended."""

SETUP_SECONDS = 30
"""More than a start takes on a busy machine."""


def flags(inputs: Path, output_dir: Path, *more: str, steps: int = 100_000) -> list[str]:
    """Of a run that goes on until it is ended, unless `steps` says otherwise."""
    common = f"--model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir {output_dir}"
    return [*common.split(), "--max_steps", str(steps), "--per_device_train_batch_size", "2", *more]


def error_of(text: str) -> str:
    """The one line that says what is wrong, in what all ranks have printed."""
    assert not re.search(r'^ *File ".*/lopt_pp/', text, re.MULTILINE), f"a traceback:\n{text}"
    lines = [line for line in text.splitlines() if "lopt-pp: error:" in line]
    assert len(lines) == 1, f"not one error line:\n{text}"
    return lines[0]


def failed(started: list[Rank], seconds: float = SETUP_SECONDS) -> str:
    """Waits until all ranks have failed by themselves, and returns the one error line."""
    for rank in started:
        assert rank.status(seconds) > 0, rank.text
    text = "".join(rank.text for rank in started)
    assert "Traceback" not in text, text
    return error_of(text)


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def steps_of(output_dir: Path) -> int:
    """The steps that the metrics have so far."""
    path = output_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) // 2 if path.exists() else 0
