"""Files and directories that are whole or as they were: after crashes, on full disks, and for whoever may read them."""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lopt_pp.util.files import (
    copy_files,
    missing_directories,
    move_files,
    new_directory,
    remove_empty,
    replace_directory,
    write_file,
    write_text,
)

CRASHING = """
import os, signal, sys
from pathlib import Path
from lopt_pp.util.files import write_file

def write(path):
    with path.open("w") as file:
        file.write("half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

write_file(Path(sys.argv[1]), write)
"""


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file grow above `size` bytes: like a full disk, this lets a part be written first."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_text_file_is_written_and_replaced(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "file"
    for text in ("one\n", "größer\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode() and names(tmp_path) == ["file"]
        assert mode(path) == 0o666 & ~umask


def test_a_library_that_makes_private_files_leaves_one_with_the_usual_permissions(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a.safetensors"
    write_file(path, lambda unfinished: save_file({"a": torch.arange(3)}, unfinished))
    assert load_file(path)["a"].tolist() == [0, 1, 2] and names(tmp_path) == ["a.safetensors"]
    assert mode(path) == 0o666 & ~umask


def test_a_process_that_is_killed_half_way_leaves_the_old_file_and_the_next_one_writes_over_the_rest(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    killed = subprocess.run([sys.executable, "-c", CRASHING, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old" and names(tmp_path) == ["file", "file.unfinished"]
    write_text(path, "new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_old_file_and_nothing_besides(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        write_text(path, 1000 * "new")
    assert path.read_text() == "old" and names(tmp_path) == ["file"]


def test_whatever_goes_wrong_is_raised_as_it_is(tmp_path: Path) -> None:
    def fail(unfinished: Path) -> None:
        unfinished.write_text("half")
        raise KeyError("as it is")

    with pytest.raises(KeyError, match="as it is"):
        write_file(tmp_path / "file", fail)
    assert names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "file", "text")
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "text")


def test_the_content_is_on_the_disk_before_the_file_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_size, path.exists())))
    write_text(path, "12345", sync=True)
    assert synced == [(5, False)] and path.read_text() == "12345"
    write_text(path, "123")
    assert len(synced) == 1


def test_what_a_link_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("one", "two"):
        write_text(link, text)
        assert link.is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == text


def test_a_pipe_gets_the_text(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 100) == b"text" and names(tmp_path) == ["pipe"]
    os.close(reader)


def test_a_directory_is_filled_beside_its_place(tmp_path: Path, umask: int) -> None:
    place = tmp_path / "model"
    place.mkdir()  # An empty one may be there.
    with new_directory(place) as unfinished:
        (unfinished / "a").write_text("a")
        assert names(place) == [] and unfinished.parent.parent == tmp_path
    assert names(place) == ["a"] and names(tmp_path) == ["model"]
    assert mode(place) == 0o777 & ~umask


def test_a_directory_that_cannot_be_filled_or_moved_leaves_what_was_there(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with pytest.raises(KeyError), new_directory(place) as unfinished:
        (unfinished / "a").write_text("a")
        raise KeyError
    assert names(tmp_path) == []
    place.mkdir()
    (place / "old").write_text("old")
    with pytest.raises(OSError, match="not empty"), new_directory(place) as unfinished:
        (unfinished / "a").write_text("a")
    assert names(tmp_path) == ["model"] and names(place) == ["old"]


def test_directories_that_were_missing_are_removed_again_as_far_as_they_are_empty(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    missing = missing_directories(tmp_path / "there" / "a" / "b" / "c")
    assert missing == [tmp_path / "there" / "a" / "b" / "c", tmp_path / "there" / "a" / "b", tmp_path / "there" / "a"]
    missing[1].mkdir(parents=True)
    (missing[2] / "file").touch()
    remove_empty(missing)
    assert names(missing[2]) == ["file"]
    (missing[2] / "file").unlink()
    remove_empty(missing)
    assert names(tmp_path) == ["there"] and missing_directories(tmp_path) == []


def test_copies_have_the_usual_permissions(tmp_path: Path, umask: int) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "deep").mkdir(parents=True)
    for name in ("file", "deep/file"):
        (source / name).write_text(name)
        (source / name).chmod(0o604)
    copy_files(source, target, ["file", "deep/file"])
    assert (target / "deep" / "file").read_text() == "deep/file"
    assert mode(target) == mode(target / "deep") == 0o777 & ~umask
    assert mode(target / "file") == mode(target / "deep" / "file") == 0o666 & ~umask


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    for content in ("one", "two"):
        unfinished = tmp_path / "unfinished"
        unfinished.mkdir()
        (unfinished / content).touch()
        replace_directory(unfinished, tmp_path / "place")
        assert names(tmp_path) == ["place"] and names(tmp_path / "place") == [content]


def test_files_are_moved_in_order(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("part", "index", "stays"):
        (source / name).write_text(name)
    with pytest.raises(FileNotFoundError):
        move_files(source, target, ["part", "missing", "index"])
    assert names(target) == ["part"], "the index came before a part that is missing"
    move_files(source, target, ["index"])
    assert names(target) == ["index", "part"] and names(source) == ["stays"]
    move_files(source, target, ["stays"])
    assert not source.exists() and names(target) == ["index", "part", "stays"]
