"""What is read of files as people have them: as it stands there, or refused with the file and the row."""

import bz2
import codecs
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from lopt_pp.data import DataConfig
from lopt_pp.data.raw_rows import RawRows
from lopt_pp.data.sources import read_rows
from lopt_pp.errors import LoptError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def open_file(path: Path) -> RawRows:
    return read_rows(DataConfig(train_file=[str(path)]))


def rows(path: Path) -> list[dict[str, Any]]:
    raw, read = open_file(path), []
    for index in range(len(raw)):
        try:
            read.append(raw[index])
        except LoptError as error:  # As all do that read rows: they know which one it is.
            raise LoptError(f"{raw.name(index)}: {error}") from error
    return read


def error_of(path: Path) -> str:
    with pytest.raises(LoptError) as raised:
        rows(path)
    assert "\n" not in str(raised.value)
    return str(raised.value).replace(f"{path.parent}/", "")


TEXTS = [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        '{"text": "one"}\n{"text": "two"}',
        '{"text": "one"}\r\n \t \r\n\r\n  {"text": "two"}\r\n   ',
        '\ufeff{"text": "one"}\n{"text": "two"}\n',
        '[{"text": "one"}, {"text": "two"}]',
        '\ufeff\n [\n{"text": "one"}\n,\n{"text": "two"}\n]\n',
        '["one", "two"]',
        '{\n"text": "one"\n}\n{"text":\n"two"}',
    ],
)
def test_json(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert rows(tmp_path / name) == TEXTS


@pytest.mark.parametrize(
    "row",
    [
        {"text": "2024-01-01", "when": "2024-01-01T00:00:00"},
        {"text": 99999999999999999999, "more": -1e400},
        {"text": "a", "keys": {"b": None, "c": [1, "two", 3.5, None, {"d": []}]}},
        {"text": "é\u2028\0", "": ""},
    ],
)
def test_what_a_row_holds_stays_as_it_is(tmp_path: Path, row: dict[str, Any]) -> None:
    given = [row, {"text": None}, {"other": 1}, row]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in given))
    (tmp_path / "rows.json").write_text(json.dumps(given, ensure_ascii=False, indent=1))
    assert rows(tmp_path / "rows.jsonl") == rows(tmp_path / "rows.json") == given


def test_lines_that_reach_over_the_chunks_that_a_file_is_read_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b'{"text": "one"}\n\n  \n{"text": "two"}\n \n{"text": "three"}'
    (tmp_path / "rows.jsonl").write_bytes(content)
    for chunk in range(1, len(content) + 1):
        monkeypatch.setattr("lopt_pp.data.text_files._CHUNK", chunk)
        assert rows(tmp_path / "rows.jsonl") == [*TEXTS, {"text": "three"}], chunk


def test_csv(tmp_path: Path) -> None:
    content = (
        '\ufeffquestion,"an\nswer",\r\n\r\n  \r\n007,"a ""b"", c\r\nd",2024-01-01\r\nNone,\r\n,é,"  "\r\nnan,1e5,x'
    )
    (tmp_path / "rows.csv").write_bytes(content.encode())
    assert rows(tmp_path / "rows.csv") == [
        {"question": "007", "an\nswer": 'a "b", c\r\nd', "Unnamed: 2": "2024-01-01"},
        {"question": "None", "an\nswer": None, "Unnamed: 2": None},
        {"question": None, "an\nswer": "é", "Unnamed: 2": "  "},
        {"question": "nan", "an\nswer": "1e5", "Unnamed: 2": "x"},
    ]
    assert open_file(tmp_path / "rows.csv").name(2) == f"row 3 of {tmp_path}/rows.csv (line 8)"
    (tmp_path / "old_mac.csv").write_bytes(b"text\rone\r\rtwo\r")
    assert rows(tmp_path / "old_mac.csv") == TEXTS
    (tmp_path / "long.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert rows(tmp_path / "long.csv") == [{"text": "x" * 200_000}]


LINE = b'{"text": "one"}\n'


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("a.jsonl", b'null\n{"text": "c"}\n', "row 1 of a.jsonl: it is not a JSON object, but null; leave it out"),
        ("a.jsonl", LINE + b"3\n", "row 2 of a.jsonl: it is not a JSON object, but int; leave it out"),
        ("a.json", b'[{"text": "a"},\n null]', "row 2 of a.json: it is not a JSON object, but null; leave it out"),
        (
            "a.jsonl",
            LINE + b'\n{"text": "caf\xe9"}\n',
            "row 2 of a.jsonl (line 3): it is not UTF-8 (invalid continuation byte: 0xe9); save the file as UTF-8",
        ),
        (
            "a.json",
            b'[{"text": "a"},\n {"text": "caf\xe9"}]',
            "--train_file a.json cannot be read: line 2 is not UTF-8 (invalid continuation byte: 0xe9); save it as "
            "UTF-8",
        ),
        (
            "a.csv",
            b"text\na\ncaf\xe9\n",
            "row 2 of a.csv (line 3): it is not UTF-8 (invalid continuation byte: 0xe9); save the file as UTF-8",
        ),
        (
            "a.csv",
            b"caf\xe9\na\n",
            "--train_file a.csv cannot be read: of its header, it is not UTF-8 (invalid continuation byte: 0xe9); save "
            "the file as UTF-8",
        ),
        (
            "a.jsonl",
            LINE.decode().encode("utf-16"),
            "--train_file a.jsonl cannot be read: it is UTF-16; save it as UTF-8",
        ),
        (
            "a.json",
            LINE.decode().encode("utf-16-be"),
            "--train_file a.json cannot be read: it is UTF-16, or not a text; save it as UTF-8",
        ),
        (
            "a.jsonl",
            LINE + b'{"text": "on',
            "row 2 of a.jsonl: it is not JSON: Unterminated string starting at (column 10); correct it or leave it out",
        ),
        (
            "a.json",
            b'[{"text": "a"},\n{"text": "b"}\n',
            "row 3 of a.json (line 3): it is not JSON: the list has no comma here, or is cut off (column 1); correct "
            "it or leave it out",
        ),
        (
            "a.json",
            b'[{"text": "a"}]\n[]',
            "row 2 of a.json (line 2): it is not JSON: something follows the end of the list (column 1); correct it "
            "or leave it out",
        ),
        (
            "a.jsonl",
            LINE + b"\0" * 20,
            "row 2 of a.jsonl: it is not JSON: Expecting value (column 1); correct it or leave it out",
        ),
        (
            "a.jsonl",
            b'{"a": [{"text": "x", "text": "y"}]}\n',
            "row 1 of a.jsonl: it is not JSON: an object has the key 'text' twice; correct it or leave it out",
        ),
        ("a.json", b"[" * 100_000, "row 1 of a.json (line 1): it is not JSON: maximum recursion depth exceeded"),
        (
            "a.csv",
            b"a,b\n1,2,3\n",
            "row 1 of a.csv (line 2): it has 3 cells, and the header has 2; quote commas in text",
        ),
        (
            "a.csv",
            b'a,b\n1,"2\n3,4\n',
            "row 1 of a.csv (line 2): a quote opens in it that is never closed; is the file cut off?",
        ),
        (
            "a.csv",
            b"text,text\na,b\n",
            "--train_file a.csv cannot be read: its header has the column text twice; give each its own name",
        ),
        ("a.csv", b"\n \n", "--train_file a.csv cannot be read: it has no header; give it one, and a row or more"),
        ("a.json", b"[ ]", "--train_file a.json has no rows; give data with a row or more"),
        (
            "a.jsonl",
            gzip.compress(LINE, mtime=0),
            "--train_file a.jsonl cannot be read: it is compressed by gzip; let its name end in .gz",
        ),
        (
            "a.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "--train_file a.jsonl cannot be read: it is a pointer of Git LFS, not the file itself; fetch that with "
            "`git lfs pull`",
        ),
    ],
)
def test_one_line_names_file_and_row(tmp_path: Path, name: str, content: bytes, error: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert error_of(tmp_path / name).startswith(error)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_compressed(tmp_path: Path, suffix: str) -> None:
    lines = "".join(json.dumps({"text": str(number**9)}) + "\n" for number in range(2000)).encode()
    content, path = COMPRESSIONS[suffix](lines), tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(content)
    assert [row["text"] for row in rows(path)] == [str(number**9) for number in range(2000)]
    assert open_file(path).name(1) == f"row 2 of {path}"
    path.write_bytes(content[: len(content) // 2])
    assert error_of(path).startswith(f"--train_file {path.name} cannot be read: it is damaged or cut off (")
    assert not [file for file in (tmp_path / "cache").rglob(".*")], "what was unpacked is not left behind"
    path.write_bytes(b"no such thing")
    assert error_of(path).startswith(f"--train_file {path.name} cannot be read: it is damaged or cut off (")


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE * 3)
    raw = open_file(path)
    assert raw[0] == TEXTS[0] and len(raw) == 3
    os.truncate(path, 20)
    for index in range(3):
        with pytest.raises(LoptError, match="^the file has changed since the run began to read it"):
            raw[index]
    path.write_bytes(LINE * 3)
    raw = open_file(path)
    assert len(raw) == 3
    path.unlink()
    with pytest.raises(LoptError, match="^the file can no longer be opened: No such file"):
        raw[0]
    assert raw.name(1) == f"row 2 of {path}"


def test_a_file_that_nobody_may_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(LINE)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # The superuser may read whatever its mode says.
        patch.setattr(Path, "open", refuse)
        assert error_of(path) == "--train_file rows.jsonl cannot be read: Permission denied"


def test_many_files_are_not_open_at_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number:03}.jsonl" for number in range(200)]
    for path in paths:
        path.write_bytes(codecs.BOM_UTF8 + LINE)
    before = len(os.listdir("/proc/self/fd"))
    raw = read_rows(DataConfig(train_file=[str(tmp_path)]))
    assert [raw[index] for index in range(len(raw))] == TEXTS[:1] * 200
    assert len(os.listdir("/proc/self/fd")) < before + 100
