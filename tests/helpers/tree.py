"""The files of the repository."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from pages import ROOT


def text_files() -> Iterator[Path]:
    """All files of the repository that hold text; not what tests, builds and virtual environments leave."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()]
    others = (*ignored, ".git", "*.png")
    for folder, folders, names in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if not any(fnmatch(name, other) for other in others))
        yield from (Path(folder, name) for name in sorted(names) if not any(fnmatch(name, other) for other in others))
