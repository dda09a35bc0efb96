"""A manifest that is not as it was written is refused, with its path."""

import json
from pathlib import Path
from typing import Any

import pytest

from lopt_pp.checkpoint.manifest import read_manifest, seal, write_manifest
from lopt_pp.errors import LoptError

pytestmark = pytest.mark.slow

GOOD: dict[str, Any] = {
    "format": 2,
    "step": 6,
    "edges": [2, 4],
    "run": {},
    "parts": [{"size": 1, "sha256": "0" * 64}, {"size": 1, "sha256": "f" * 64}],
}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 3},
        {"step": -1},
        {"step": "6"},
        {"step": True},
        {"edges": [4, 2]},
        {"edges": [0, 4]},
        {"edges": [2]},
        {"edges": None},
        {"run": []},
        {"parts": [{"size": 1}, {"size": 1}]},
        {"parts": [{"size": -1, "sha256": "0" * 64}] * 2},
        {"parts": [{"size": 1, "sha256": "../../etc/passwd"}] * 2},
        {"parts": []},
    ],
)
def test_a_manifest_is_checked_before_it_is_used(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(seal(GOOD)))
    assert read_manifest(tmp_path).path(1) == tmp_path / "stage-00001-of-00002.safetensors"
    (tmp_path / "manifest.json").write_text(json.dumps(seal(GOOD | change)))
    with pytest.raises(LoptError, match=str(tmp_path / "manifest.json")):
        read_manifest(tmp_path)


def test_no_flipped_bit_of_a_manifest_goes_unseen(tmp_path: Path) -> None:
    """A step of 7 in place of 6 would be a manifest as good as any."""
    path = tmp_path / "manifest.json"
    write_manifest(tmp_path, {name: value for name, value in GOOD.items() if name != "format"})
    content, expected = path.read_bytes(), read_manifest(tmp_path)
    for place in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                assert read_manifest(tmp_path) == expected  # White space, say.
            except LoptError as error:
                assert str(path) in str(error)
