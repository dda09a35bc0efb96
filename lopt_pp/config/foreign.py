"""Takes flags of TRL and transformers for ours where they mean the same, and says what to do about the others.

`trl_flags.py` has the table, `other_trainers.py` hints for further names.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lopt_pp.config.foreign_rules import INVALID, NO_EFFECT, SAME, Row, same, word_of
from lopt_pp.config.other_trainers import HINTS, OLDER
from lopt_pp.config.trl_flags import TABLE
from lopt_pp.errors import LoptError, shown

ROWS: dict[str, Row] = {name: row for rows in (*TABLE.values(), OLDER) for row in rows for name in row.flags}
"""What becomes of a flag of TRL, by its name."""


class Translation:
    """Flags of one source, a file or a command line, as ours.

    Args:
        source: the file, in messages; empty for the command line.

    Attributes:
        flags: ours with their values.
        passed_over: flags of TRL that changed none of them, with their values as words.
    """

    def __init__(self, source: str = "") -> None:
        self._source = source
        self._origins: dict[str, str] = {}
        self.flags: dict[str, Any] = {}
        self.passed_over: dict[str, str] = {}

    def add(self, name: str, value: Any) -> dict[str, Any]:
        """Takes a flag, ours or TRL's.

        Returns:
            What it is of ours.

        Raises:
            LoptError: it cannot be had here, or says something else than another flag.
        """
        row = ROWS.get(name)
        found = {name: value} if row is None or row.rule is same else self._become(row, name, value)
        for ours, meant in found.items():
            before = self.flags.get(ours)
            # Of one and the same flag the last wins, as ever.
            if self._origins.get(ours, name) != name and None not in (before, meant):
                self._check_same(ours, before, name, meant)
            self.flags[ours], self._origins[ours] = meant, name
        return found

    def _become(self, row: Row, name: str, value: Any) -> dict[str, Any]:
        if row.here != SAME and (value is None or word_of(value) in ("none", "null")):
            return {}
        found = row.rule(name, value)
        if isinstance(found, str):
            given = "" if value is True or found.startswith(INVALID) else f" {_shown(value)}"
            raise LoptError(f"{self._source}--{name}{given}: {plain(found or row.note)}")
        if not found and (row.here == NO_EFFECT or name in _STRATEGY):
            self.passed_over[name] = word_of(value)
        return found

    def _check_same(self, ours: str, before: Any, name: str, meant: Any) -> None:
        if word_of(before) != word_of(meant):
            both = f"--{self._origins[ours]} and --{name}"
            raise LoptError(
                f"{self._source}{both} are one flag here, and differ ({_shown(before)} against {_shown(meant)}); "
                f"give --{ours} alone"
            )


_STRATEGY = ("eval_strategy", "evaluation_strategy")


def eval_strategy_of(passed_over: Mapping[str, str]) -> str | None:
    """Of TRL's `--eval_strategy`, what was given; it is checked against the other flags."""
    return next((passed_over[name] for name in _STRATEGY if name in passed_over), None)


def without_effect(passed_over: Mapping[str, str]) -> str | None:
    """A line on those that somebody may expect something of; None where there are none."""
    names = [f"--{name}" for name, word in passed_over.items() if name not in _STRATEGY and word not in ("false", "")]
    return f"of no effect here: {', '.join(names)} (docs/trl.md)" if names else None


def translate_file(path: object, settings: Mapping[str, Any]) -> Translation:
    """The flags of a file."""
    return translate_settings(settings, f"{path}: ")


def translate_settings(settings: Mapping[str, Any], source: str = "") -> Translation:
    """Flags with their values; `source` stands before messages about them."""
    translation = Translation(source)
    for name, value in settings.items():
        translation.add(name, value)
    return translation


def translate_arguments(arguments: Sequence[str], options: set[str]) -> tuple[list[str], Translation]:
    """The flags of a command line.

    Args:
        arguments: the command line.
        options: the names of the parser's flags, with underscores.

    Returns:
        The command line with our flags, and what was made of it.

    Raises:
        LoptError: one cannot be had, or is called otherwise here.
    """
    translation, words = Translation(), list[str]()
    for name, value, written in _parts(arguments):
        if name is None:
            words += written
            continue
        if name not in options and name.startswith("no_") and value is True and name[3:] in options | ROWS.keys():
            name, value, written = name[3:], False, [f"--{name[3:]}=false"]
        if name not in options and name in HINTS:
            raise LoptError(f"unknown flag --{name}; {HINTS[name]}")
        found = translation.add(name, value)
        if found == {name: value}:
            words += written  # As it is, so that what is wrong with it is said as ever.
            continue
        for ours, meant in found.items():
            words += [f"--{ours}", *map(str, meant)] if isinstance(meant, list) else [f"--{ours}={meant}"]
    return words, translation


def _parts(arguments: Sequence[str]) -> Iterator[tuple[str | None, Any, list[str]]]:
    """A command line flag by flag: its name with underscores, its value (True where it has none), and its words.

    The name is None for what is not a flag.
    """
    position = 0
    while position < len(arguments):
        word = arguments[position]
        if word == "--" or not word.startswith("--"):
            rest = arguments[position:] if word == "--" else [word]
            yield None, None, list(rest)
            position += len(rest)
            continue
        name, equals, value = word[2:].partition("=")
        end = position + 1
        while not equals and end < len(arguments) and not _is_flag(arguments[end]):
            end += 1
        values = [value] if equals else list(arguments[position + 1 : end])
        written = list(arguments[position:end])
        yield name.replace("-", "_"), True if not values else values[0] if len(values) == 1 else values, written
        position = end


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not re.fullmatch(r"-\.?\d.*", word)


def plain(note: str) -> str:
    """A note of the table without its Markdown; links become the page's path."""
    return re.sub(r"\[[^\]]*\]\(([^)#]*)[^)]*\)", r"docs/\1", note).replace("`", "")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and len(value) < 80 else shown(value)
