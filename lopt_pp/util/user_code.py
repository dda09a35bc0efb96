"""Code of the user's own, which flags name as `package.module:name`: loaded here, in one way for all of them.

A program that is started as a script, as `lopt-pp` is, has the script's directory on its path where `python -m` has the
current one. So that both find the same code, the current directory is searched first while the module that a flag names
is imported. Afterwards it stays on the path in the last place, for what that module imports later: what is installed
wins then, so that no file that lies there by chance replaces a library, here or in processes that inherit the path.
"""

import contextlib
import hashlib
import importlib
import operator
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lopt_pp.errors import LoptError, first_line


class UserCodeError(LoptError):
    """There is no code as a flag names it, or its module fails; `__cause__` is what Python says of it."""


def load_user_object(flag: str, name: str, what: str) -> Any:
    """The object of the user's own that a flag names; its module is imported where that has not been done.

    Args:
        flag: with its dashes, for messages.
        name: its value: `package.module:name`, or `package.module:Class.name`.
        what: can be given, for the message about a value of another form.

    Raises:
        UserCodeError: there is no such module, it fails, or it has nothing of that name.
        LoptError: the value has another form.
    """
    module_name, attribute = _split(name)
    if not module_name or not attribute:
        raise LoptError(f"{flag} {name}: give {what}")
    module = None
    try:
        with _current_directory_first():
            module = importlib.import_module(module_name)
            return operator.attrgetter(attribute)(module)
    except (Exception, SystemExit) as error:  # Whatever the user's module may raise; a script may want to exit.
        lacks = module is not None and isinstance(error, AttributeError)
        reason = f"has no {attribute}" if lacks else f"cannot be imported: {describe(error)}"
        raise UserCodeError(f"{flag} {name}: {module_name} {reason}") from error


def load_user_function(flag: str, name: str, what: str) -> "UserFunction":
    """The function of the user's own that a flag names.

    Args:
        flag: with its dashes, for messages.
        name: its value: `package.module:function`.
        what: can be given, for the message about a value of another form.

    Raises:
        UserCodeError: there is no such module, it fails, or it has nothing of that name.
        LoptError: the value has another form, or names what cannot be called.
    """
    function = load_user_object(flag, name, what)
    if not callable(function):
        raise LoptError(f"{flag} {name} is not a function, but {function!r}")
    return UserFunction(function, flag, name, what)


class UserFunction:
    """A function of the user's own, which a process that it is handed to loads as this one has.

    Pickled by its module's name alone it could be another one there, whose path is not searched in the same order.

    Args:
        function: it.
        flag: as for `load_user_function`, as are the others.
    """

    def __init__(self, function: Any, flag: str, name: str, what: str) -> None:
        self._function = function
        self._origin = flag, name, what

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return load_user_function, self._origin


def source_digest(name: str) -> str:
    """A text that changes with the source of a module that `load_user_object` has loaded: empty where it has none."""
    path = getattr(sys.modules[_split(name)[0]], "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def search_current_directory() -> None:
    """Puts the current directory on the path, in the last place, for code that the user has allowed to run.

    Does nothing where it is there already, as with `python -m`, or where it has been removed.
    """
    with contextlib.suppress(OSError):
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())


def describe(error: BaseException) -> str:
    """The type and the first line of an error that the user's code has raised."""
    return f"{type(error).__name__}: {first_line(error)}"


def place_of(error: BaseException) -> str:
    """Where the user's code has raised an error, as ` (metrics.py, line 7)`; empty where that is not known.

    It is the innermost line of the file of the function that was called; what it calls in turn are mostly libraries.

    Args:
        error: caught by the function that has called the user's.
    """
    # `UserFunction` calls some of them.
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)[1:] if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    if not own:
        return ""
    name = Path(own[-1].filename).name
    # What was sent to this process by value has no file.
    return f" (line {own[-1].lineno})" if name.startswith("<") else f" ({name}, line {own[-1].lineno})"


def _split(name: str) -> tuple[str, str]:
    module_name, _, attribute = name.partition(":")
    return module_name, attribute


@contextlib.contextmanager
def _current_directory_first() -> Iterator[None]:
    """Searches the current directory first, but for the directory of a script that the user has started."""
    search_current_directory()
    try:
        here = os.getcwd()
    except OSError:  # It has been removed: nothing is to be found there.
        yield
        return
    # A script's directory comes first on the path, unless Python has been told (-P) to leave it off.
    sys.path.insert(0 if sys.flags.safe_path else 1, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # The user's module may have put another path in place of this one.
            sys.path.remove(here)
