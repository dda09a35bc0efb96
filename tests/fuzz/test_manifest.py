"""Manifests of every kind: one that says nothing impossible, or a clear error."""

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mutations import DEEP, JUNK, json_files

from lopt_pp.checkpoint.manifest import Manifest, read_manifest, seal
from lopt_pp.errors import LoptError

DOCUMENT = {
    "format": 2,
    "step": 120,
    "edges": [2, 3, 5],
    "run": {"seed": 42, "rows_per_step": 8},
    "parts": [{"size": 100 + stage, "sha256": f"{stage}" * 64} for stage in range(3)],
}

VALUES = JUNK | st.sampled_from(
    [[0], [1, 1], [2, 3, 5], [3, 2], {"0": 1}, "../../x", "/etc/passwd", "A" * 64, "a" * 64]
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("manifests") / "checkpoint-120"


def read(directory: Path, content: bytes) -> Manifest | None:
    """Writes and reads a manifest; None where it is refused, with an error that names it."""
    directory.mkdir(exist_ok=True)
    (directory / "manifest.json").write_bytes(content)
    with suppress(LoptError):
        read_manifest(directory)
    # Once more with the checksum that belongs to it: what it says is what is to be looked at.
    with suppress(ValueError, RecursionError):
        if isinstance(document := json.loads(content), dict):
            (directory / "manifest.json").write_text(json.dumps(seal(document)))
    try:
        return read_manifest(directory)
    except LoptError as error:
        assert str(directory) in str(error) and len(str(error)) < 1000
        return None


@given(json_files(DOCUMENT, VALUES))
@example(b"")
@example(b"null")
@example(b"\xff\xfe")
@example(b'{"format": NaN}')
@example(json.dumps(DOCUMENT | {"format": 1}).encode())
@example(json.dumps(DOCUMENT | {"format": 1, "run": {"--seed": 42, "the rows of a step": 8}}).encode())
@example(b'{"format": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b'{"format": 1, "step": ' + b"9" * 5000 + b"}")
@example(DEEP.encode())
@example(b'{"a":' * 100_000)
def test_manifests(directory: Path, content: bytes) -> None:
    manifest = read(directory, content)
    if manifest is None:
        return
    assert type(manifest.step) is int and manifest.step >= 0
    assert isinstance(manifest.run, dict)
    assert len(manifest.specs) == len(manifest.parts) > 0
    assert [(spec.stage, spec.num_stages) for spec in manifest.specs] == [
        (stage, len(manifest.specs)) for stage in range(len(manifest.specs))
    ]
    assert manifest.specs[0].start == 0
    assert all(spec.start < spec.stop for spec in manifest.specs)
    assert all(before.stop == after.start for before, after in pairwise(manifest.specs))
    assert all(type(part.size) is int and part.size >= 0 and len(part.sha256) == 64 for part in manifest.parts)
    for stage in range(len(manifest.specs)):
        assert manifest.path(stage).resolve().parent == directory.resolve()
        with pytest.raises(LoptError, match=r"cannot be read"):
            manifest.check_part(stage)


def test_the_document_that_these_start_from_is_a_manifest(directory: Path) -> None:
    manifest = read(directory, json.dumps(DOCUMENT).encode())
    assert manifest is not None and manifest.step == 120
    assert [(spec.start, spec.stop) for spec in manifest.specs] == [(0, 2), (2, 3), (3, 5)]
