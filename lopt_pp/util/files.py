"""Files and directories that are there whole or not at all.

They are written beside their place and moved there when all of them is written, so a reader finds the new content or
what was there before, and a program that ends half-way, or a full disk, leaves what was there before.
"""

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNFINISHED = ".unfinished"
"""Ends the name of what is still being written."""


def write_file(path: Path, write: Callable[[Path], object], sync: bool = False) -> None:
    """Lets `write` make a file, which takes its place once it is whole, with the permissions that the umask leaves.

    A library may make the file by a temporary one of its own, which only its user may read (safetensors does).

    Args:
        path: of the file. What is half-written is beside it for as long as this lasts.
        write: is given the path to write to.
        sync: whether to wait until the content is on the disk.

    Raises:
        OSError: it cannot be written; what was at `path` is as it was. So it is with whatever `write` raises.
    """
    unfinished = path.with_name(path.name + UNFINISHED)
    unfinished.unlink(missing_ok=True)
    try:
        unfinished.touch()
        mode = stat.S_IMODE(unfinished.stat().st_mode)
        write(unfinished)
        unfinished.chmod(mode)
        if sync:
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str, sync: bool = False) -> None:
    """Writes a text file, in UTF-8, that takes its place once it is whole.

    Where a symbolic link is, what it points to is replaced. A pipe, or a terminal, has nothing to replace: it gets the
    text.

    Args:
        path: of the file.
        text: its content.
        sync: whether to wait until the content is on the disk.

    Raises:
        OSError: it cannot be written; what was at `path` is as it was.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    place = path.resolve() if path.is_symlink() else path
    write_file(place, lambda unfinished: unfinished.write_text(text, encoding="utf-8"), sync)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Gives a directory to fill, which takes its place once the context ends; where that raises, it is removed.

    Args:
        path: of the directory; an empty one may be there.

    Raises:
        OSError: it cannot be made, or there is something at `path`.
    """
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=f".{path.name}.") as scratch:
        # A directory in it, since the temporary one is for its user alone.
        unfinished = Path(scratch) / path.name
        unfinished.mkdir()
        yield unfinished
        if path.exists():
            path.rmdir()
        os.replace(unfinished, path)


def missing_directories(path: Path) -> list[Path]:
    """A directory and those above it, as far as they are not there, the innermost first; for `remove_empty`."""
    missing = []
    for directory in (path.absolute(), *path.absolute().parents):
        if directory.exists():
            break
        missing.append(directory)
    return missing


def remove_empty(directories: Iterable[Path]) -> None:
    """Removes directories, in order, as far as they are there and empty."""
    for directory in directories:
        with suppress(OSError):
            directory.rmdir()


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies files from one directory to another, with the permissions that the umask leaves.

    Raises:
        OSError: one cannot be copied.
    """
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def replace_directory(unfinished: Path, path: Path) -> None:
    """Moves a directory that is whole to its place, and removes what was there.

    A program that ends half-way leaves the one or the other, if not at its place then beside it.

    Raises:
        OSError: it cannot be moved.
    """
    replaced = path.with_name(f"{path.name}.replaced{UNFINISHED}")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
    os.replace(unfinished, path)
    shutil.rmtree(replaced, ignore_errors=True)


def move_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Moves files from one directory to another in the order given, and removes the first where it is empty then.

    A reader who waits for the last of them finds all of them.

    Raises:
        OSError: one cannot be moved.
    """
    for name in names:
        os.replace(source / name, target / name)
    if source.exists() and not any(source.iterdir()):
        source.rmdir()
