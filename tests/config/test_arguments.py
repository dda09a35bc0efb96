"""The flags that dataclasses make: the same as TRL's parser makes of them."""

import argparse
import dataclasses
import inspect
import re
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytest
from transformers import SchedulerType
from trl import TrlParser

from lopt_pp.config.arguments import DataclassParser
from lopt_pp.config.optim import FOLLOW_A_METRIC, OptimConfig, Schedule
from lopt_pp.config.plan import PlanConfig
from lopt_pp.config.train_config import COMPONENTS
from lopt_pp.errors import LoptError

WORDS = ["", "x", "1", "-1", "1.5", "1e-4", "nan", "true", "No", "T", "0", "maybe", "none", "NULL", "linear", "full"]


def theirs(*components: type) -> argparse.ArgumentParser:
    """TRL's parser of the same fields; what they say besides their help it would hand on to argparse."""
    plain = []
    for component in components:
        hints = typing.get_type_hints(component)
        fields = [
            (f.name, hints[f.name], field(default=f.default, metadata={"help": f.metadata["help"]}))
            for f in dataclasses.fields(component)
        ]
        title = {"_argument_group_name": component._argument_group_name}  # type: ignore[attr-defined]
        plain.append(dataclasses.make_dataclass(component.__name__, fields, namespace=title))
    return TrlParser(plain, allow_abbrev=False)  # type: ignore[arg-type]


def ours(*components: type) -> DataclassParser:
    return DataclassParser(components, "prog", "prog FLAGS", "Does something.")


def facts(action: argparse.Action) -> dict[str, Any]:
    names = ("option_strings", "dest", "nargs", "const", "default", "required", "help", "metavar")
    choices = None if action.choices is None else list(action.choices)
    return {name: getattr(action, name) for name in names} | {"class": type(action), "choices": choices}


def read(parser: argparse.ArgumentParser, action: argparse.Action, word: str) -> object:
    """What becomes of a word, or what is said against it."""
    if action.nargs == 0:
        return None
    try:
        value = parser._get_value(action, word)
        parser._check_value(action, value)
    except argparse.ArgumentError as error:
        return str(error)
    return repr(value)


@pytest.mark.parametrize("component", [*COMPONENTS, PlanConfig])
def test_flags_are_those_that_trl_makes(component: type) -> None:
    expected, made = theirs(component), ours(component)
    for action in expected._actions:
        if typing.get_type_hints(component).get(action.dest) == bool | None:
            action.nargs, action.const = "?", True  # Without a value it is true here, as every other boolean.
    assert [facts(action) for action in made._actions] == [facts(action) for action in expected._actions]
    for there, here in zip(expected._actions, made._actions, strict=True):
        for word in WORDS:
            assert read(made, here, word) == read(expected, there, word), (here.dest, word)
    assert [group.title for group in made._action_groups] == [group.title for group in expected._action_groups]


COMMAND_LINES = [
    "",
    "--max_steps 3 --seed=4 --seed 5 --learning-rate 1e-3",
    "--train_file a b --train-file=c --packing",
    "--packing no --no_shuffle_dataset --no-train-embeddings",
    "--shuffle_dataset false --shuffle_dataset",
    "--lr_scheduler_type cosine --dtype=bfloat16 --eval_split_size 0.1 --data_parallel none",
    "--max_step 3 --zzz x -q",
    "-- --seed 4",
    "--seed -1 --adam_epsilon=-1e-3",
    "--split 1,2 x --trace= --run_name=a=b",
]
UNUSABLE = [
    "--max_steps",
    "--max_steps ten",
    "--max_steps 1.5",
    "--learning_rate fast",
    "--train_file",
    "--packing maybe",
    "--backend mpi",
    "--dtype",
    "--lr_scheduler_type SchedulerType.LINEAR",
    "--no_shuffle_dataset=true",
    "--data_parallel nothing",
]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_are_read_as_trl_reads_them(line: str) -> None:
    words = ["--model_name_or_path", "m", "--output_dir", "o", *line.split()]
    assert ours(*COMPONENTS).parse_known_args(words) == theirs(*COMPONENTS).parse_known_args(words)


@pytest.mark.parametrize("line", [*UNUSABLE, "--seed 4"])
def test_command_lines_are_refused_as_trl_refuses_them(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = [] if line == "--seed 4" else ["--model_name_or_path", "m", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        theirs(*COMPONENTS).parse_known_args([*required, *line.split()])
    said = capsys.readouterr().err.rpartition(": error: ")[2].strip().removeprefix("argument ")
    said = re.sub(r"/--[a-z-]+", "", said)  # The second name of each flag, with dashes.
    with pytest.raises(LoptError) as refused:
        ours(*COMPONENTS).parse([*required, *line.split()])
    assert str(refused.value) == said
    assert capsys.readouterr().err == ""


@dataclass(frozen=True)
class Example:
    """One flag of each kind."""

    _argument_group_name: ClassVar[str] = "Examples"

    needed: str = field(metadata={"help": "Required."})
    number_of_them: int = field(default=3, metadata={"help": "How many, 50%% of them."})
    share: float | None = field(default=None, metadata={"help": "How much."})
    is_on: bool = field(default=True, metadata={"help": "Whether."})
    kind: Literal["a", "b"] = field(default="a", metadata={"help": "Which."})
    files: list[str] | None = field(default=None, metadata={"help": "Of what."})


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as left:
        ours(Example).parse(["--help"])
    assert left.value.code == 0
    assert (
        capsys.readouterr().out
        == inspect.cleandoc(
            """
        usage: prog FLAGS

        Does something.

        options:
          -h, --help            show this help message and exit

        Examples:
          --needed STR          Required.
          --number_of_them INT  How many, 50% of them. (default: 3)
          --share FLOAT         How much.
          --is_on BOOL          Whether. (default: True)
          --kind a|b            Which. (default: a)
          --files STR           Of what.
        """
        )
        + "\n"
    )


def test_values_of_a_file_are_defaults() -> None:
    parser = ours(Example)
    parser.set_file({"needed": "n", "number_of_them": "5", "share": 0.5, "is_on": False, "files": ["f"]})
    assert parser.parse(["--share", "0.25", "more"]) == (
        [Example("n", 5, 0.25, False, "a", ["f"])],
        ["more"],
        {"needed", "number_of_them", "share", "is_on", "files"},
    )


def test_it_is_known_what_is_given() -> None:
    parser = ours(Example)
    parser.set_file({"needed": "n", "share": None, "is_on": "off"})
    line = ["--kind", "a", "--no_is_on", "--files", "x"]
    assert parser.parse(line)[2] == {"needed", "is_on", "kind", "files"}
    assert parser.parse([])[0] == [Example("n", is_on=False)]


@pytest.mark.parametrize("kind", [dict[str, int], int | str, Literal[1, 2], list, object])
def test_a_type_that_no_flag_can_have(kind: Any) -> None:
    made = dataclasses.make_dataclass("Odd", [("odd", kind, field(default=None, metadata={"help": "Odd."}))])
    made._argument_group_name = "Odd"  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="^odd: no flag has values of the type "):
        ours(made)


def test_schedules_are_those_of_transformers() -> None:
    assert typing.get_args(Schedule) == tuple(kind.value for kind in SchedulerType)
    for kind in SchedulerType:
        if kind.value in FOLLOW_A_METRIC:
            with pytest.raises(LoptError, match=f"^--lr_scheduler_type {kind.value} follows an evaluation"):
                OptimConfig(lr_scheduler_type=kind)  # type: ignore[arg-type]
        else:
            taken = OptimConfig(lr_scheduler_type=kind).lr_scheduler_type  # type: ignore[arg-type]
            assert type(taken) is str and taken == kind.value
