"""`lopt-pp chat MODEL`: talk to a model in the terminal. Ctrl-C ends an answer, Ctrl-D the program."""

import argparse
import contextlib
import io
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lopt_pp.commands.answering import Answering, add_answering, open_answering, read_answering
from lopt_pp.commands.common import CommandParser
from lopt_pp.errors import LoptError
from lopt_pp.util.console import print_error

_HELP = """\
/reset          begins a new conversation
/system TEXT    begins one with this system message; without TEXT, with none
/exit           ends, as Ctrl-D does; Ctrl-C ends an answer
A line that ends in \\ goes on in the next one; lines between two lines of \"\"\" are one message."""

_LEAVE = ("/exit", "/quit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 1 where a text from a pipe was not answered."""
    parser = CommandParser(
        "lopt-pp chat", description=f"{__doc__}\n\n{_HELP}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_answering(parser, max_new_tokens=1024, temperature=None, seed=None)
    given = read_answering(parser, arguments)
    return _run(given)


def _run(given: argparse.Namespace) -> int:
    if sys.stdin is None:
        raise LoptError("standard input is closed: there is nobody to talk to")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # What is not text shall not end the conversation.
        sys.stdin.reconfigure(errors="replace")
    answering, _ = open_answering(given, lambda tokenizer: _check_system(tokenizer, given.system))
    if given.seed is not None:
        # Late, since a mistake in the flags need not wait for it.
        from transformers import set_seed

        set_seed(given.seed)
    conversation = Conversation(answering)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # It gives `input` a line that can be edited, and a history.
            import readline  # noqa: F401
    if not answering.tokenizer.chat_template:
        print_notice("the model has no chat template: it goes on from each text by itself")
    if is_terminal:
        print_notice("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the program")
    all_answered = True
    for message in messages(is_terminal):
        if message in _LEAVE:
            break
        try:
            conversation.take(message)
        except LoptError as error:  # It may be mended by the next message.
            print_error(str(error))
            all_answered &= _is_command(message)
    return 0 if is_terminal or all_answered else 1


def _check_system(tokenizer: Any, system: str | None) -> None:
    """Sees that there can be a conversation with this system message, if any.

    Raises:
        LoptError: the tokenizer has no chat template, or one that refuses it.
    """
    from lopt_pp.evaluation.answers import encode_chat

    if system is None:
        return
    if not tokenizer.chat_template:
        raise LoptError("--system needs a chat template, which is not there")
    try:
        encode_chat(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": "Hello"}])
    except LoptError as error:
        raise LoptError(f"--system: {error}") from error


def _is_command(message: str) -> bool:
    """Whether it is for this program, and not for the model."""
    return message.lstrip().startswith("/")


def print_notice(text: str) -> None:
    """Tells the user something that is not part of an answer."""
    print(f"lopt-pp: {text}", file=sys.stderr, flush=True)


def messages(is_terminal: bool) -> Iterator[str]:
    """What the user says, message by message; those that are empty are left out.

    Args:
        is_terminal: whether standard input is one: then a prompt is shown, and Ctrl-C gives a line up.
    """
    while True:
        try:
            text = _message("> " if is_terminal else "", ". " if is_terminal else "")
        except EOFError:
            if is_terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends)")
            continue
        if text.strip():
            yield text


def _message(prompt: str, further: str) -> str:
    """Reads one message, of several lines where it is marked so.

    Raises:
        EOFError: there is no more; a message that was begun is given all the same.
    """
    line = input(prompt)
    if line.strip() == '"""':
        return "\n".join(_until(lambda: input(further), lambda line: line.strip() == '"""'))
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        try:
            lines.append(input(further))
        except EOFError:
            break
    return "\n".join(lines)


def _until(read: Callable[[], str], is_last: Callable[[str], bool]) -> Iterator[str]:
    with contextlib.suppress(EOFError):
        while not is_last(line := read()):
            yield line


class Conversation:
    """A conversation with a model; without a chat template each text stands by itself.

    Args:
        answering: the model.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering, self._tokenizer = answering, answering.tokenizer
        self._system: str | None = answering.given.system
        self.messages: list[dict[str, str]] = []
        self._begin()

    def _begin(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def take(self, message: str) -> None:
        """Does what a message asks for: a command, or an answer, which is printed.

        Raises:
            LoptError: it cannot be answered; the conversation is as it was.
        """
        command, _, rest = message.strip().partition(" ")
        if not _is_command(message):
            self._answer(message)
        elif command == "/reset":
            self._begin()
            print_notice("a new conversation")
        elif command == "/system":
            if not self._tokenizer.chat_template:
                raise LoptError("/system needs a chat template, which the model does not have")
            self._system = rest.strip() or None
            self._begin()
            print_notice(f"a new conversation, with {'this' if self._system else 'no'} system message")
        elif command == "/help":
            print_notice(f"\n{_HELP}")
        else:
            raise LoptError(f"there is no {command}; /help lists the commands")

    def _answer(self, message: str) -> None:
        from lopt_pp.evaluation.answers import encode, encode_chat

        asked = [*self.messages, {"role": "user", "content": message}]
        has_template = bool(self._tokenizer.chat_template)
        prompt = encode_chat(self._tokenizer, asked) if has_template else encode(self._tokenizer, message, None, True)
        with _interruptible() as is_interrupted:
            answer = self._answering.answer(prompt, is_interrupted)
            if is_interrupted():
                print_notice("stopped")
        if has_template:
            self.messages = [*asked, {"role": "assistant", "content": answer.strip()}]


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Gives what says whether Ctrl-C was pressed meanwhile; pressed once more, it interrupts as ever."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
