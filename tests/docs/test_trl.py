"""The table of docs/trl.md has every flag of `trl sft`, and none that does not exist on either side."""

import dataclasses
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import trl
from flags import FLAGS

ROOT = Path(__file__).parents[2]
OURS = set(FLAGS)
THEIR_CONFIGS = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)


def names(cell: str) -> list[str]:
    return re.findall("`--([a-z0-9_]+)", cell)


def rows() -> list[tuple[list[str], str, str]]:
    """The flags of TRL, what is here, and the note of each row."""
    text = (ROOT / "docs" / "trl.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `--.*$", text, re.M)]
    return [(names(theirs), ours, note) for theirs, ours, note in cells]


def test_every_flag_of_trl_has_one_row() -> None:
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for package in ("trl", "transformers"):
        if version(package) != pinned[package]:
            pytest.skip(f"the table is of {package} {pinned[package]}, and {version(package)} is installed")
    theirs = {flag.name for config in THEIR_CONFIGS for flag in dataclasses.fields(config) if flag.init}
    listed = [name for row in rows() for name in row[0]]
    assert sorted(listed) == sorted(set(listed)), "a flag with two rows"
    assert not theirs - set(listed), "flags of TRL without a row"
    assert not set(listed) - theirs, "rows of flags that TRL does not have"
    text = (ROOT / "docs" / "trl.md").read_text()
    for package, name in (("trl", "TRL"), ("transformers", "transformers")):
        assert f"{name} {'.'.join(pinned[package].split('.')[:2])}" in text


@pytest.mark.parametrize(("theirs", "ours", "note"), rows(), ids=lambda value: str(value)[:40])
def test_a_row_is_true_of_our_flags(theirs: list[str], ours: str, note: str) -> None:
    assert theirs
    if ours == "the same":
        assert set(theirs) <= OURS, "not flags of ours"
    elif ours == "-":
        assert not set(theirs) & OURS, "we have this flag by now"
    else:
        assert names(ours) and set(names(ours)) <= OURS
    assert set(names(note)) <= OURS | {name for row in rows() for name in row[0]}
