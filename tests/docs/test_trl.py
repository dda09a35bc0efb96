"""The table of what becomes of TRL's flags has each of them, is true of ours, and is what docs/trl.md shows."""

import dataclasses
import inspect
import re
import runpy
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import trl
from flags import FLAGS

from lopt_pp import Trainer
from lopt_pp.config.foreign import ROWS, Translation, plain
from lopt_pp.config.foreign_rules import MISSING, NO_EFFECT, SAME, Row, same
from lopt_pp.config.other_trainers import HINTS, OLDER
from lopt_pp.config.trl_arguments import ARGUMENTS
from lopt_pp.config.trl_flags import TABLE
from lopt_pp.errors import LoptError

ROOT = Path(__file__).parents[2]
OURS = set(FLAGS)
THEIR_CONFIGS = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig)
THEIRS = {flag.name: flag for config in THEIR_CONFIGS for flag in dataclasses.fields(config) if flag.init}
ROWS_OF_TODAY = [row for rows in TABLE.values() for row in rows]


def names(text: str) -> list[str]:
    return re.findall("--([a-z0-9_]+)", text)


def skip_other_versions() -> None:
    pinned = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for package in ("trl", "transformers"):
        if version(package) != pinned[package]:
            pytest.skip(f"the table is of {package} {pinned[package]}, and {version(package)} is installed")


def test_every_flag_of_trl_has_one_row() -> None:
    skip_other_versions()
    listed = [name for row in ROWS_OF_TODAY for name in row.flags]
    assert sorted(listed) == sorted(set(listed)), "a flag with two rows"
    assert not THEIRS.keys() - set(listed), "flags of TRL without a row"
    assert not set(listed) - THEIRS.keys(), "rows of flags that TRL does not have"
    assert not {name for row in OLDER for name in row.flags} & {*THEIRS, *OURS}, "a flag of today"
    text = (ROOT / "docs" / "trl.md").read_text()
    for package, name in (("trl", "TRL"), ("transformers", "transformers")):
        assert f"{name} {'.'.join(version(package).split('.')[:2])}" in text


def test_a_trainer_has_the_arguments_of_trls() -> None:
    """In its order, so that they may be given without their names; what cannot be had is refused by its own."""
    skip_other_versions()
    theirs, ours = (list(inspect.signature(kind).parameters) for kind in (trl.SFTTrainer, Trainer))
    assert [argument.name for argument in ARGUMENTS] == ours == theirs
    for argument in ARGUMENTS:
        assert not re.search(r"[`\[]", plain(argument.note))
        assert set(names(argument.note)) <= OURS
        if argument.here == MISSING:
            with pytest.raises(LoptError, match=re.escape(f"{argument.name}: {plain(argument.note)}; leave it out")):
                given: dict[str, Any] = {argument.name: object(), "train_dataset": [{"text": "a"}]}
                Trainer("model", {"output_dir": "out"}, **given)


def test_the_page_shows_the_table() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "site" / "trl_table.py"))
    page = script["PAGE"].read_text()
    assert script["written"](page) == page, "run: python docs/site/trl_table.py"


@pytest.mark.parametrize("row", [*ROWS_OF_TODAY, *OLDER], ids=lambda row: row.flags[0])
def test_a_row_is_true_of_our_flags(row: Row) -> None:
    assert row.flags
    if row.here == SAME:
        assert set(row.flags) <= OURS, "not flags of ours"
    else:
        assert not set(row.flags) & OURS, "we have this flag by now"
        assert row.rule is not same
    if row.here in (NO_EFFECT, MISSING):
        assert row.note, "it is refused, or has no effect, without a reason"
    elif row.here != SAME:
        assert set(row.here.split()) <= OURS
    assert set(names(row.note)) <= OURS | ROWS.keys()
    assert not re.search(r"[`\[]", plain(row.note))


def test_what_is_not_in_force_there_is_not_refused() -> None:
    """A file may have TRL's own default of any flag that is missing here."""
    skip_other_versions()
    for row in ROWS_OF_TODAY:
        for name in row.flags if row.here in (MISSING, NO_EFFECT) else ():
            default, factory = THEIRS[name].default, THEIRS[name].default_factory
            if factory is not dataclasses.MISSING:
                default = factory()
            assert Translation().add(name, default) == {}, name


CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("bf16", True, {"dtype": "bfloat16"}),
    ("bf16", "yes", {"dtype": "bfloat16"}),
    ("bf16", False, {"dtype": "float32"}),
    ("dataset_train_split", "train[:9]", {"dataset_split": "train[:9]"}),
    ("test_split_size", 0.1, {"eval_split_size": 0.1}),
    ("warmup_steps", 0.1, {"warmup_ratio": 0.1}),
    ("warmup_steps", "10", {"warmup_steps": "10"}),
    ("train_sampling_strategy", "sequential", {"shuffle_dataset": False}),
    ("train_sampling_strategy", "random", {"train_sampling_strategy": "random"}),
    ("activation_checkpointing", True, {"gradient_checkpointing": True}),
    ("gradient_checkpointing_kwargs", {"use_reentrant": False}, {}),
    ("gradient_checkpointing_kwargs", "{'use_reentrant': True}", {}),
    ("model_init_kwargs", {"dtype": "bfloat16", "revision": "v2"}, {"dtype": "bfloat16", "model_revision": "v2"}),
    ("model_init_kwargs", '{"attn_implementation": "eager"}', {"attn_implementation": "eager"}),
    ("loss_type", "chunked_nll", {}),
    ("adafactor", True, {"optim": "adafactor"}),
    ("use_cpu", True, {"backend": "gloo"}),
    ("ddp_backend", "nccl", {"backend": "nccl"}),
    ("ddp_timeout", 60, {"stream_timeout": 60}),
    ("save_strategy", "no", {"save_steps": 0}),
    ("save_strategy", "steps", {}),
    ("save_strategy", "epoch", {"save_strategy": "epoch"}),
    ("save_strategy", "best", {"save_strategy": "best"}),
    ("save_strategy", None, {}),
    ("report_to", ["tensorboard"], {"report_to": ["tensorboard"]}),
    ("report_to", "all", {"report_to": ["all"]}),
    ("report_to", ["wandb", "tensorboard"], {"report_to": ["wandb", "tensorboard"]}),
    ("report_to", [], {"report_to": ["none"]}),
    ("eval_strategy", "steps", {}),
    ("eval_strategy", "epoch", {"eval_strategy": "epoch"}),
    ("evaluation_strategy", "epoch", {"eval_strategy": "epoch"}),
    ("fsdp", "", {}),
    ("push_to_hub", False, {"push_to_hub": False}),
    ("max_seq_length", 512, {"max_length": 512}),
    ("torch_dtype", "bfloat16", {"dtype": "bfloat16"}),
    ("group_by_length", True, {"train_sampling_strategy": "group_by_length"}),
    ("completion_only_loss", "none", {}),
    ("lora_r", None, {}),
    ("dtype", "bf16", {"dtype": "bfloat16"}),
    ("torch_dtype", "torch.float32", {"dtype": "float32"}),
    ("dtype", "bfloat16", {"dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("name", "value", "ours"), CASES)
def test_what_means_the_same_is_taken(name: str, value: Any, ours: dict[str, Any]) -> None:
    row = ROWS[name]
    assert Translation().add(name, value) == ours
    assert row.here in (SAME, MISSING, NO_EFFECT) or not ours or set(ours) <= set(row.here.split())


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("fp16", True, "^--fp16: float16 would need its loss scaled; take --dtype bfloat16$"),
        ("dtype", "fp16", "^--dtype fp16: float16 would need its loss scaled; take bfloat16$"),
        ("torch_dtype", "auto", "^--torch_dtype auto: give float32 or bfloat16"),
        ("save_steps", 0.1, "^--save_steps 0.1: a whole number of steps"),
        ("max_length", None, "^--max_length None: rows need a longest length here"),
        ("ddp_backend", "gloo", "^--ddp_backend gloo: nccl; with gloo, a run here computes on CPUs"),
        ("use_peft", "true", "^--use_peft true: all weights of a stage are trained; adapters are not supported$"),
        ("optim_target_modules", "all-linear", "^--optim_target_modules all-linear: GaLore and APOLLO"),
        ("model_init_kwargs", {"rope_theta": 5}, "^--model_init_kwargs .*: rope_theta has no flag here"),
        ("ignore_data_skip", True, "^--ignore_data_skip: it saves the time to come to the next rows"),
        ("resume_from_checkpoint", True, "^--resume_from_checkpoint: give latest"),
        ("deepspeed", {"zero": 3}, "^--deepspeed .*: --sharding full"),
        ("average_tokens_across_devices", False, "^--average_tokens_across_devices False: always so"),
        ("parallelism_config", "{}x", "^--parallelism_config {}x: .*see docs/layouts.md$"),
    ],
)
def test_what_means_something_else_is_refused(name: str, value: Any, error: str) -> None:
    with pytest.raises(LoptError, match=error):
        Translation().add(name, value)


def test_hints_name_flags_that_there_are() -> None:
    assert not HINTS.keys() & {*OURS, *ROWS}
    for name, hint in HINTS.items():
        assert set(names(hint)) <= OURS | {"nproc", "config"}, name
        assert len(hint.split()) > 3
