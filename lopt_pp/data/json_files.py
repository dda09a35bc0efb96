"""Rows in JSON. Nothing is guessed: a string stays one whatever it looks like, and a row has its own keys only."""

import codecs
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lopt_pp.data.cache import made_once
from lopt_pp.data.text_files import Places, TextFile, decoded
from lopt_pp.errors import LoptError, first_line

_LONG = 1 << 20
_BLANKS = b" \t\r\n"
_BLANK = re.compile(r"[ \t\r\n]*")


class JsonFile(TextFile):
    """An object a line; or a list of objects, or objects over several lines each."""

    def find(self) -> Places:
        first = self._first_line()
        if first.startswith(b"[") or (first.startswith(b"{") and not _is_json(first)):
            return Places.load(made_once(f"{self.digest}-json.places", self._scan))
        return self._find_lines()

    def _first_line(self) -> bytes:
        """The first line that is not blank; of a list, only how it begins, since it may be all of the file."""
        with self.path.open("rb") as file:
            while line := file.readline(_LONG):
                if text := line.removeprefix(codecs.BOM_UTF8).strip(_BLANKS):
                    return text if text.startswith(b"[") or line.endswith(b"\n") else text + file.readline()
        return b""

    def _find_lines(self) -> Places:
        """Where the lines that are not blank start and stop. The file's digest is made on the way."""
        sha, ends, firsts, size = hashlib.sha256(), [], [], 0
        begins_line = True
        for content in self.chunks():
            sha.update(content)
            chunk = np.frombuffer(content, np.uint8)
            newlines = np.flatnonzero(chunk == ord("\n"))
            begins = np.concatenate([[0], newlines + 1]) if begins_line else newlines + 1
            begins_line = bool(len(begins)) and begins[-1] == len(chunk)
            firsts.append(chunk[begins[:-1] if begins_line else begins])
            ends.append(newlines + size)
            size += len(chunk)
        self.digest = sha.hexdigest()
        if begins_line:  # One more, which is empty.
            firsts.append(np.zeros(1, np.uint8))
        stops = np.concatenate([*ends, [size]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1])
        filled = stops > starts
        # Hardly a line begins with a blank; those that do are looked at one by one.
        for line in np.flatnonzero(filled & np.isin(np.concatenate(firsts), np.frombuffer(_BLANKS, np.uint8))):
            filled[line] = bool(self.bytes_between(int(starts[line]), int(stops[line])).strip(_BLANKS))
        return Places(starts[filled], stops[filled])

    def _scan(self, path: Path) -> None:
        """Writes to a file where the values of a JSON document are."""
        content = self.path.read_bytes()
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            self.fail(f"line {line} is not UTF-8 ({error.reason}: 0x{content[error.start]:02x}); save it as UTF-8")
        found: list[tuple[int, int]] = []
        try:
            found.extend(_values(text))
        except (ValueError, RecursionError) as error:
            # `extend` keeps what came before the error.
            place = getattr(error, "pos", found[-1][1] if found else 0)
            where = f"row {len(found) + 1} of {self.name} (line {text.count(chr(10), 0, place) + 1})"
            raise LoptError(f"{where}: it is not JSON: {_what(error)}; correct it or leave it out") from error
        Places.of(found if text.isascii() else list(_in_bytes(text, found))).save(path)

    def _parse(self, content: bytes) -> dict[str, Any]:
        text = decoded(content)
        try:
            row = _DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise LoptError(f"it is not JSON: {_what(error)}; correct it or leave it out") from error
        if isinstance(row, str):  # Of a list of texts.
            return {"text": row}
        if not isinstance(row, dict):
            raise LoptError(
                f"it is not a JSON object, but {'null' if row is None else type(row).__name__}; leave it out"
            )
        return row


def _what(error: Exception) -> str:
    """What is wrong with a JSON text, and where in its line."""
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else first_line(error)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a key that comes twice it would be unclear which value is meant."""
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"an object has the key {next(key for key in keys if keys.count(key) > 1)!r} twice")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _is_json(line: bytes) -> bool:
    try:
        _DECODER.decode(line.decode())
    except json.JSONDecodeError:
        return False
    except (ValueError, RecursionError):  # What is wrong with it is said when it is read as a row.
        return True
    return True


def _values(text: str) -> Iterator[tuple[int, int]]:
    """Where the items of a JSON list are, or JSON values that follow each other."""
    place = _skip_blanks(text, 1 if text.startswith("\ufeff") else 0)
    if not text.startswith("[", place):
        while place < len(text):
            stop = _DECODER.raw_decode(text, place)[1]
            yield place, stop
            place = _skip_blanks(text, stop)
        return
    place = _skip_blanks(text, place + 1)
    if not text.startswith("]", place):
        while True:
            stop = _DECODER.raw_decode(text, place)[1]
            yield place, stop
            place = _skip_blanks(text, stop)
            if text.startswith("]", place):
                break
            if not text.startswith(",", place):
                raise json.JSONDecodeError("the list has no comma here, or is cut off", text, place)
            place = _skip_blanks(text, place + 1)
    if (place := _skip_blanks(text, place + 1)) < len(text):
        raise json.JSONDecodeError("something follows the end of the list", text, place)


def _skip_blanks(text: str, place: int) -> int:
    found = _BLANK.match(text, place)
    assert found is not None
    return found.end()


def _in_bytes(text: str, places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Places in a text as places in its UTF-8."""
    last = size = 0
    for start, stop in places:
        begin = size + len(text[last:start].encode())
        size = begin + len(text[start:stop].encode())
        last = stop
        yield begin, size
