"""What must match on resume, what may change: each flag does what it declares."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from chat import make_tokenizer
from transformers import LlamaConfig
from two_configs import MODEL, make, rows, two_configs

from lopt_pp.checkpoint.compatibility import in_words, may_change, must_match, shared_by_ranks
from lopt_pp.checkpoint.manifest import write_manifest
from lopt_pp.checkpoint.resume import Wanted, find_start
from lopt_pp.config.fields import Resume
from lopt_pp.config.train_config import EFFECTS, Config
from lopt_pp.data import DataConfig, load_rows
from lopt_pp.data.streaming import StreamedRows
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError, shown
from lopt_pp.model.partition import split_evenly

STEPS = 20

TO_DO = "; give the flags and rows as they were, or another --output_dir; --overwrite_output_dir without .* anew"


class Told:
    """What a run says where it goes on from a checkpoint of another one."""

    def __init__(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        self._path, self._caplog = tmp_path / "checkpoint-6", caplog

    def __call__(
        self,
        before: Config,
        after: Config,
        train_rows: tuple[str | StreamedRows, str | StreamedRows] = ("rows", "rows"),
        held_out: tuple[str | None, str | None] = (None, None),
        model: tuple[LlamaConfig, LlamaConfig] = (MODEL, MODEL),
        replicas: tuple[int, int] = (1, 1),
        num_steps: tuple[int, int] = (STEPS, STEPS),
    ) -> list[str]:
        """The warnings.

        Raises:
            LoptError: it does not go on.
        """
        made: list[Mapping[str, Any]] = []
        for place, config in enumerate((before, after)):
            digest = held_out[place]
            given = train_rows[place]
            trained = given if isinstance(given, StreamedRows) else rows(given)
            made.append(must_match(config, model[place], trained, replicas[place]))
            made.append(may_change(config, num_steps[place], None if digest is None else rows(digest)))
        specs = split_evenly(4, 2)
        self._path.mkdir()
        parts = [{"size": 1, "sha256": "0" * 64}] * 2
        write_manifest(self._path, {"step": 6, "edges": [2, 4], "run": {**made[0], **made[1]}, "parts": parts})
        store = dist.HashStore()
        with self._caplog.at_level(logging.WARNING):
            start = find_start(
                World(0, 1, torch.device("cpu"), "gloo", store, store),
                Wanted(str(self._path), self._path.parent, False, num_steps[1], made[2], made[3], str, "rows.jsonl"),
                stages=[],
                specs=specs,
                checks_parts=False,
            )
        assert start.steps_done == 6
        return [record.getMessage() for record in self._caplog.records]


@pytest.fixture
def told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Told:
    return Told(tmp_path, caplog)


def flags_that(effect: Resume) -> list[str]:
    return [name for name, effects in EFFECTS.items() if effects.on_resume is effect]


def difference(name: str, before: Config, after: Config) -> str:
    return f"--{name} is {shown(after.flags()[name])}, and was {shown(before.flags()[name])}"


@pytest.mark.parametrize("name", flags_that(Resume.MUST_MATCH))
def test_a_flag_that_must_match_is_refused(name: str, told: Told) -> None:
    before, after = two_configs(name)
    expected = f"checkpoint-6 is of another run: {difference(name, before, after)}"
    with pytest.raises(LoptError, match=f"{re.escape(expected)}{TO_DO}"):
        told(before, after)


@pytest.mark.parametrize("name", flags_that(Resume.MAY_CHANGE))
def test_a_flag_that_may_change_is_warned_of(name: str, told: Told) -> None:
    before, after = two_configs(name)
    assert told(before, after) == [f"going on with another setting than before: {difference(name, before, after)}"]


@pytest.mark.parametrize("name", flags_that(Resume.NO_EFFECT))
def test_a_flag_without_effect_on_the_result_is_not_spoken_of(name: str, told: Told) -> None:
    assert told(*two_configs(name)) == []


DECIDES = {
    "train_rows_sha256": "train_file dataset_name dataset_config dataset_split datasets dataset_mapping "
    "dataset_text_field eos_token chat_template_path assistant_only_loss completion_only_loss "
    "allow_no_stop_token max_length",
    "evaluation_rows_sha256": "eval_file dataset_test_split",
    "model_config": "model_name_or_path model_revision added_tokens resize_to_multiple_of",
    "edges": "num_stages split",
    "rows_per_step": "per_device_train_batch_size gradient_accumulation_steps data_parallel",
    "num_steps": "max_steps num_train_epochs",
    "method": "method",
    "local_objective": "local_objective",
    "auxiliary_layers": "auxiliary_layers",
    "auxiliary_choice": "auxiliary_choice",
}
"""What is compared in place of flags; `edges` are the cuts, which a manifest has by themselves."""


def test_what_is_compared_in_place_of_a_flag_is_there() -> None:
    flags = [flag for some in DECIDES.values() for flag in some.split()]
    assert sorted(flags) == sorted(flags_that(Resume.DERIVED))
    config = make(**NEXT)
    assert DECIDES.keys() - {"edges"} <= {*must_match(config, MODEL, rows(), 1), *may_change(config, STEPS, rows())}


NEXT = {"local_objective": "next_token"}

GROUPED = {"train_sampling_strategy": "group_by_length"}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ({}, {"per_device_train_batch_size": 9}, "the rows of a step is 9, and was 8"),
        ({}, {"gradient_accumulation_steps": 2}, "the rows of a step is 16, and was 8"),
        (
            GROUPED,
            {**GROUPED, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
            "the rows that are grouped by length is 4, and was 8",
        ),
        ({"packing": True}, {"packing": True, "max_length": 512}, "--max_length is 512, and was 1024"),
        ({}, {"method": "e2e"}, "--method is 'e2e', and was 'lopt'"),
        ({}, {"method": "frozen"}, "--local_objective is 'none', and was 'reconstruction'"),
        ({}, NEXT, "--local_objective is 'next_token', and was 'reconstruction'"),
        (NEXT, {**NEXT, "auxiliary_layers": 1}, "--auxiliary_layers is 1, and was 2"),
        (NEXT, {**NEXT, "auxiliary_choice": "3"}, "--auxiliary_choice is '3', and was 'even'"),
        ({}, {"dtype": "pure_bfloat16"}, "the dtype of the weights is 'torch.bfloat16', and was 'torch.float32'"),
    ],
)
def test_what_flags_decide_must_match(before: dict[str, Any], after: dict[str, Any], expected: str, told: Told) -> None:
    with pytest.raises(LoptError, match=f"is of another run: {re.escape(expected)}{TO_DO}"):
        told(make(**before), make(**after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"per_device_train_batch_size": 8}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
        ({}, {"max_length": 512}),
        ({}, {"auxiliary_layers": 1}),
        ({}, {"auxiliary_choice": "3"}),
        ({**NEXT, "auxiliary_choice": "2,3"}, {**NEXT, "auxiliary_choice": "2,3", "auxiliary_layers": 1}),
        ({"method": "frozen"}, {"local_objective": "none"}),
        ({}, {"train_file": ["moved.jsonl"], "model_name_or_path": "moved"}),
    ],
)
def test_what_decides_nothing_else_goes_on_without_a_word(
    before: dict[str, Any], after: dict[str, Any], told: Told
) -> None:
    assert told(make(**before), make(**after)) == []


def test_what_a_run_is_made_of_must_match(told: Told) -> None:
    differ = r"the training rows \(sha256\) is 'b', and was 'a' \(of rows.jsonl, which may have changed\)"
    with pytest.raises(LoptError, match=f"is of another run: {differ}{TO_DO}"):
        told(make(), make(), train_rows=("a", "b"))


def test_files_of_streamed_rows_must_match(told: Told, tmp_path: Path) -> None:
    def stream(name: str, *texts: str) -> StreamedRows:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        made = load_rows(DataConfig(train_file=[str(path)], streaming=True), make_tokenizer())
        assert isinstance(made, StreamedRows)
        return made

    texts = ["some"] * 1000
    one, moved = stream("one.jsonl", *texts), stream("moved.jsonl", *texts)
    edited = stream("edited.jsonl", *texts[:1], "same", *texts[2:])
    assert one.digest == edited.digest, "a sample does not show it"
    with pytest.raises(
        LoptError, match=r"is of another run: the content of the training files \(sha256\) is '.*', and"
    ):
        told(make(), make(), train_rows=(one, edited))
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert told(make(), make(), train_rows=(one, moved)) == []


def test_a_checkpoint_that_does_not_know_the_files_of_its_rows_is_gone_on_from(told: Told, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "some"}\n')
    made = load_rows(DataConfig(train_file=[str(tmp_path / "one.jsonl")], streaming=True), make_tokenizer())
    assert isinstance(made, StreamedRows) and made.files_digest
    assert told(make(), make(), train_rows=(made.digest, made)) == []


def test_the_model_must_match(told: Told) -> None:
    with pytest.raises(LoptError, match="is of another run: the model's config is "):
        told(make(), make(), model=(MODEL, LlamaConfig(num_hidden_layers=4, rms_norm_eps=1e-3)))


def test_rows_that_are_held_out_are_named_before_what_is_left_of_the_others(told: Told) -> None:
    with pytest.raises(LoptError, match=f"is of another run: --eval_split_size is 5, and was None{TO_DO}"):
        told(make(), make(eval_split_size=5), train_rows=("all", "some"))


def test_more_replicas_have_more_rows(told: Told) -> None:
    with pytest.raises(LoptError, match=f"the rows of a step is 16, and was 8{TO_DO}"):
        told(make(), make(), replicas=(1, 2))
    assert must_match(make(per_device_train_batch_size=4), MODEL, rows(), 2) == must_match(make(), MODEL, rows(), 1)


def test_other_steps_and_other_evaluation_rows_are_warned_of(told: Told) -> None:
    assert told(make(), make(), held_out=("a", "b"), num_steps=(20, 30)) == [
        "going on with another setting than before: the number of steps is 30, and was 20; --lr_scheduler_type linear "
        "follows the new number, so the weights end otherwise than those of a run that had it from the start",
        "going on with another setting than before: the evaluation rows (sha256) is 'b', and was 'a'",
    ]


def test_names_are_identifiers_and_what_is_no_flag_has_words() -> None:
    config = make(**NEXT, packing=True, eval_split_size=5)
    names = {
        *shared_by_ranks(config, MODEL, rows(), rows()),
        *must_match(config, MODEL, rows(), 1),
        *may_change(config, STEPS, rows()),
    }
    assert all(name.isidentifier() for name in names)
    for name in names:
        assert in_words(name).startswith("--") == (name in EFFECTS), name
    assert not must_match(config, MODEL, rows(), 1).keys() & may_change(config, STEPS, rows()).keys()
