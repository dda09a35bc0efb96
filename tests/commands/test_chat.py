"""`lopt-pp chat`: a conversation in the terminal, and with a pipe."""

import io
import os
import shutil
import signal
from pathlib import Path

import pytest
from ranks import until
from terminal import terminal
from tiny import CHATML, write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import lopt_pp.cli
from lopt_pp.commands.chat import messages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that never ends by itself, and answers the same to the same."""
    return write_model(tmp_path_factory.mktemp("chat") / "model", eos_token_id=None)


def chat(
    model: Path, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *flags: str
) -> tuple[list[str], str]:
    """The answers, one to a line, and what is said besides."""
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    capsys.readouterr()  # What loading for `expected` has shown.
    given = ["chat", str(model), "--device", "cpu", "--max_new_tokens", "6", "--temperature", "0", *flags]
    assert lopt_pp.cli.main(given) == 0
    shown = capsys.readouterr()
    return shown.out.splitlines(), shown.err


def expected(model: Path, *turns: str, raw: bool = False) -> str:
    """The answer to the last turn of a conversation: a system message where the first is `S: `, then user and model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    roles = ["system"] if turns[0].startswith("S: ") else []
    roles += ["user", "assistant"] * len(turns)
    said = [{"role": role, "content": turn.removeprefix("S: ")} for role, turn in zip(roles, turns, strict=False)]
    text = turns[0] if raw else tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    loaded, ids = AutoModelForCausalLM.from_pretrained(model), prompt["input_ids"]
    answer = loaded.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]  # type: ignore[misc]
    return str(tokenizer.decode(answer, skip_special_tokens=True))


def test_a_pipe_is_answered_with_the_history(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = expected(model, "hello")
    second = expected(model, "hello", first.strip(), "1 + 2")
    said = "hello\n1 + 2\n/reset\n1 + 2\n/system add\n\nhello\n/exit\nnever read\n"
    answers, told = chat(model, said, capsys, monkeypatch)
    alone = expected(model, "1 + 2")
    assert alone != second, "the history makes no difference, so that nothing is proved"
    assert answers == [first, second, alone, expected(model, "S: add", "hello")]
    assert told == ("lopt-pp: a new conversation\nlopt-pp: a new conversation, with this system message\n")


def test_what_cannot_be_done_is_said_and_the_conversation_goes_on(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, told = chat(model, "/what\nhello", capsys, monkeypatch)
    assert answers == [expected(model, "hello")]
    assert told == "lopt-pp: error: there is no /what; /help lists the commands\n"


def test_a_model_without_a_template_goes_on_from_each_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    answers, told = chat(tmp_path, "hello\n1 + 2\n/system add\n", capsys, monkeypatch)
    assert answers == [expected(model, "hello", raw=True), expected(model, "1 + 2", raw=True)]
    assert told.splitlines() == [
        "lopt-pp: the model has no chat template: it goes on from each text by itself",
        "lopt-pp: error: /system needs a chat template, which the model does not have",
    ]
    assert lopt_pp.cli.main(["chat", str(tmp_path), "--system", "add"]) == 1
    assert capsys.readouterr().err == "lopt-pp: error: --system needs a chat template, which is not there\n"


def test_messages_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    said = 'one\\\ntwo\n\n   \n"""\n/exit\n\nthree\n"""\nfour\\\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert list(messages(is_terminal=False)) == ["one\ntwo", "/exit\n\nthree", "four"]


@pytest.mark.slow
def test_in_a_terminal_an_answer_is_interrupted_and_not_the_program(model: Path, tmp_path: Path) -> None:
    words = ["chat", model, "--device", "cpu", "--max_new_tokens", "100000", "--temperature", "0"]
    with terminal(*words, cwd=tmp_path) as shown:
        shown.wait_for_prompt()
        shown.type("hello\n")
        # The first tokens come while the others are still to be made.
        until(lambda: shown.lines[-1] not in (">", "> hello"))
        shown.press_ctrl_c()
        shown.wait_for("lopt-pp: stopped")
        shown.wait_for_prompt()
        shown.press_ctrl_c()
        shown.wait_for("(Ctrl-D or /exit ends)")
        shown.wait_for_prompt()
        shown.type("\x04")
        assert shown.status() == 0, shown.lines


def test_what_is_not_text_does_not_end_the_conversation(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["chat", str(model), "--device", "cpu", "--max_new_tokens", "6", "--temperature", "0"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n/reset\nhello\n"), encoding="utf-8"))
    assert lopt_pp.cli.main(given) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    monkeypatch.setattr("sys.stdin", None)
    assert lopt_pp.cli.main(given) == 1
    assert capsys.readouterr().err == "lopt-pp: error: standard input is closed: there is nobody to talk to\n"


@pytest.mark.parametrize("flags", [[], ["--system", "add"]])
def test_what_is_not_answered_is_a_failure(
    model: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of a template that refuses its texts, and one that is given a system message where it knows none."""
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    refused = "messages[0]['role'] == 'system'" if flags else "messages[0]['content'] == 'no'"
    (tmp_path / "chat_template.jinja").write_text(
        f"{{% if {refused} %}}{{{{ raise_exception('not I') }}}}{{% endif %}}" + CHATML
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("no\n/reset\nhello\n"))
    assert lopt_pp.cli.main(["chat", str(tmp_path), "--device", "cpu", "--max_new_tokens", "6", *flags]) == 1
    said = capsys.readouterr()
    assert f"{'--system: ' if flags else ''}the model's chat template refuses the conversation: not I" in said.err
    assert len(said.out.splitlines()) == (0 if flags else 1)


def test_a_reader_that_has_seen_enough_ends_it(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `lopt-pp chat MODEL | head`."""
    reads, writes = os.pipe()
    os.close(reads)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n"))
    with os.fdopen(writes, "w", buffering=1) as closed:
        monkeypatch.setattr("sys.stdout", closed)
        assert (
            lopt_pp.cli.main(["chat", str(model), "--device", "cpu", "--max_new_tokens", "6"]) == 128 + signal.SIGPIPE
        )
