"""What a user sees of `lopt-pp train`, line by line, from the first to the last, in a terminal."""

import re
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from terminal import Terminal, terminal

STARTED = "lopt-pp: 2 processes (--nproc 2); loading PyTorch and Transformers"
PREPARED = [
    STARTED,
    "[stage 0 (rank 0)] 2 processes, on CPUs over gloo",
    "[stage 0 (rank 0)] reading the model IN/model, and whether it splits exactly",
    "[stage 0 (rank 0)] reading the rows",
]
BEGUN = [
    *PREPARED,
    "[stage 0 (rank 0)] 40 rows of IN/rows.jsonl: 40 used",
    "[stage 0 (rank 0)] LlamaForCausalLM, cut into layers 0-1; layers 2-3; ... steps",
    "[stage 0 (rank 0)] loading the weights",
]


@pytest.fixture
def words(inputs: Path) -> list[str]:
    """A run of two processes on CPUs that never comes to its end."""
    run = f"train --model_name_or_path {inputs / 'model'} --train_file {inputs / 'rows.jsonl'} --output_dir out"
    return f"{run} --nproc 2 --backend gloo --max_steps 100000 --save_steps 50000 --logging_steps 2".split()


def seen(shown: Terminal, inputs: Path) -> list[str]:
    """The lines, without bars and the lines on a step."""
    lines = [line.removeprefix("^C").replace(str(inputs), "IN") for line in shown.lines]
    lines = [line for line in lines if not line.startswith(("Tokenizing", "|"))]
    return [line for line in lines if not re.search(r"\] step \d+/", line)]


def check_lines(lines: Sequence[str], *expected: str) -> None:
    """Compares all lines; `...` in the expected ones is for what differs."""
    patterns = [re.escape(line).replace(r"\.\.\.", ".*") for line in expected]
    for line, pattern in zip(lines, patterns, strict=False):
        assert re.fullmatch(pattern, line), (line, lines)
    assert len(lines) == len(patterns), lines


@pytest.mark.slow
def test_a_good_run(words: list[str], inputs: Path, tmp_path: Path) -> None:
    """One that is warned of a flag, goes on after a failure, and is finished when it is started again."""
    given = [*words, "--max_steps", "4", "--save_steps", "2", "--padding_free", "--max_restarts", "1"]
    with terminal(*given, cwd=tmp_path) as shown:
        assert shown.status() == 0, shown.lines
    check_lines(
        seen(shown, inputs),
        *BEGUN,
        "[stage 0 (rank 0)] checkpoint at step 2: out/checkpoint-2",
        "[stage 0 (rank 0)] checkpoint at step 4: out/checkpoint-4",
        "[stage 0 (rank 0)] the model is in out, after 0 min ... s of training",
        "[stage 0 (rank 0)] stage 0: ...",
        "[stage 0 (rank 0)] stage 1: ...",
        "[stage 0 (rank 0)] lopt-pp chat out talks to it; lopt-pp report out shows how it learned",
    )
    assert sum("step 4/4: " in line for line in shown.lines) == 1
    with terminal(*given, "--resume_from_checkpoint", "latest", cwd=tmp_path) as shown:
        assert shown.status() == 0
    check_lines(
        seen(shown, inputs),
        *BEGUN[:-1],
        "[stage 0 (rank 0)] the run is finished: out has its model, after 4 steps; ...",
    )


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        ("--max_stepps 4", "unknown flag --max_stepps; did you mean --max_steps?"),
        ("--nproc 3", "3 processes do not fit --num_stages 2: ..."),
        ("--max_restarts -1", "--max_restarts -1: at least 0"),
        ("run.yaml", "run.yaml: a YAML file comes first, or after --config: lopt-pp train run.yaml FLAGS"),
    ],
)
def test_a_mistake_in_the_flags_starts_nothing(words: list[str], tmp_path: Path, mistake: str, said: str) -> None:
    with terminal(*words, *mistake.split(), cwd=tmp_path) as shown:
        assert shown.status() == 2
    check_lines(shown.lines, f"lopt-pp: error: {said}")


@pytest.mark.slow
def test_a_mistake_in_the_rows_is_told_once(words: list[str], inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a"}\n')
    with terminal(*words, "--train_file", "rows.jsonl", cwd=tmp_path) as shown:
        assert shown.status() == 1
    check_lines(seen(shown, inputs), *PREPARED, "lopt-pp: error: row 2 of rows.jsonl: no usable columns ...")


@pytest.mark.slow
def test_a_stage_that_fails(words: list[str], inputs: Path, tmp_path: Path) -> None:
    """And does so again when it is started once more."""
    flags = ["--learning_rate", "1e38", "--max_restarts", "1"]
    with terminal(*words, *flags, cwd=tmp_path) as shown:
        assert shown.status() == 1
    failure = "lopt-pp: error: stage ...: the ... is nan; ... The weights from before that step are kept in ..."
    begins = "[stage 0 (rank 0)] no checkpoint in out to go on from: the run begins at step 1"
    check_lines(
        seen(shown, inputs),
        *BEGUN,
        failure,
        "lopt-pp: a process has failed: the run is started again (1 of --max_restarts 1)",
        *[*BEGUN[1:-1], begins, BEGUN[-1]],
        failure,
    )


@pytest.mark.slow
def test_ctrl_c_stops_a_run_in_good_order(words: list[str], inputs: Path, tmp_path: Path) -> None:
    with terminal(*words, cwd=tmp_path) as shown:
        shown.wait_for("] step 4/")
        shown.press_ctrl_c()
        assert shown.status() == 75
    lines = seen(shown, inputs)
    asked = [line for line in lines if "SIGINT: the run is asked to stop; another one ends it at once" in line]
    when = [line for line in lines if "the run stops after step " in line]
    assert {len(asked), len(when)} == {1}, lines
    rest = [line for line in lines if line not in [*asked, *when]]
    check_lines(
        rest,
        *BEGUN,
        "[stage 0 (rank 0)] checkpoint at step ...: out/checkpoint-...",
        "[stage 0 (rank 0)] stopped by SIGINT: ... of 100000 steps are done; --resume_from_checkpoint latest goes on "
        "from there",
        "[stage 0 (rank 0)] lopt-pp chat out/checkpoint-... talks to it; lopt-pp report out shows how it learned",
    )


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(words: list[str], inputs: Path, tmp_path: Path) -> None:
    with terminal(*words, cwd=tmp_path) as shown:
        shown.wait_for("] step 4/")
        shown.press_ctrl_c()
        shown.wait_for("another one ends it at once")
        shown.press_ctrl_c()
        assert shown.status() in (75, 130)
    assert "Traceback" not in "\n".join(shown.lines)


@pytest.mark.parametrize("moment", [STARTED, "reading the model"])
def test_ctrl_c_before_the_first_step(words: list[str], tmp_path: Path, moment: str) -> None:
    with terminal(*words, cwd=tmp_path) as shown:
        shown.wait_for(moment)
        shown.press_ctrl_c()
        assert shown.status() in (-signal.SIGINT, 130)
    assert "Traceback" not in "\n".join(shown.lines), shown.lines
    assert not (tmp_path / "out").exists()
