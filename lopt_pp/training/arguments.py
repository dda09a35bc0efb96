"""What the arguments of a `Trainer` say: a config, and the objects that no flag can name.

The names and their order are those of TRL's `SFTTrainer`.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from lopt_pp.config.data import IN_MEMORY
from lopt_pp.config.foreign import plain, translate_settings
from lopt_pp.config.foreign_rules import word_of
from lopt_pp.config.parser import load_config, plain_values
from lopt_pp.config.train_config import EFFECTS, Config
from lopt_pp.config.trl_arguments import ARGUMENTS
from lopt_pp.config.yaml_file import read_yaml
from lopt_pp.errors import LoptError, first_line, shown
from lopt_pp.model.in_memory import check_model, name_of

Args = Config | Mapping[str, Any] | str | Path | TrainingArguments | None
"""What `args` may be."""


def refuse(**arguments: object) -> None:
    """Refuses arguments that cannot be had.

    Raises:
        LoptError: one of them is given; says why.
    """
    notes = {argument.name: argument.note for argument in ARGUMENTS}
    for name, value in arguments.items():
        if name == "data_collator" and isinstance(value, Dataset | IterableDataset | list):
            raise LoptError(
                f"data_collator, the third argument as in TRL, is a {type(value).__name__}; give rows to train on by "
                f"name: train_dataset=..."
            )
        if value is not None:
            raise LoptError(f"{name}: {plain(notes[name])}; leave it out")


def callbacks_of(given: object) -> list[TrainerCallback]:
    """The callbacks of a list, in which there may be classes of them, too.

    Raises:
        LoptError: it is something else, or a class needs arguments.
    """
    if given is not None and not isinstance(given, Sequence):
        raise LoptError(f"callbacks is a {type(given).__name__}; give a list of callbacks")
    made = []
    for callback in given or ():
        try:
            own = callback() if isinstance(callback, type) else callback
        except TypeError as error:
            raise LoptError(f"the callback {callback.__name__}: {first_line(error)}; give an object of it") from error
        if not isinstance(own, TrainerCallback):
            raise LoptError(f"callbacks: {shown(own)} is not a transformers.TrainerCallback")
        made.append(own)
    return made


def config_of(
    model: Config | PreTrainedModel | str | Path | None,
    args: Args,
    has_rows: bool,
    held_out: Sequence[str],
    optimizer_settings: Mapping[str, Any] | None = None,
) -> Config:
    """The config of a run, from `args` and from what other arguments say of flags.

    Args:
        model: loaded, or where it is; a config in its place is that of the whole run.
        args: of the `Trainer`.
        has_rows: whether it is given rows to train on.
        held_out: names of the sets of rows to evaluate on that it is given; empty for the only one.
        optimizer_settings: flags that its optimizer's arguments say.

    Raises:
        LoptError: an argument and a flag say different things, or a flag is wrong.
    """
    if isinstance(model, Config):
        if args is not None:
            raise LoptError("the first argument is a config, and args is given, too; give one of them")
        model, args = None, model
    said: dict[str, tuple[str, Any]] = {}
    if model is not None:
        path = str(model) if isinstance(model, str | Path) else name_of(check_model(model))
        said["model_name_or_path"] = ("model", path)
    if has_rows:
        said["train_file"] = ("train_dataset", IN_MEMORY)
    if held_out:
        said["eval_file"] = ("eval_dataset", files_in_memory(held_out))
    for name, value in (optimizer_settings or {}).items():
        said[name] = ("optimizer_cls_and_kwargs", value)
    if isinstance(args, Config):
        _check(args.flags(lambda effects: True), said, is_whole=True)
        return args
    settings = _settings(args)
    given = translate_settings(settings).flags
    _check(given, said)
    if not has_rows and all(given.get(name) is None for name in ("train_file", "dataset_name", "datasets")):
        raise LoptError("there are no rows to train on: give train_dataset, or train_file or dataset_name in args")
    flags = {name: value for name, (_, value) in said.items()}
    if args is None and model is not None:  # As TRL names it.
        flags["output_dir"] = f"{flags['model_name_or_path'].rstrip('/').split('/')[-1]}-SFT"
    return load_config(str(args), **flags) if isinstance(args, str | Path) else load_config(settings, **flags)


def files_in_memory(names: Sequence[str]) -> list[str]:
    """What `--eval_file` says of sets of rows that are given as objects, by their names."""
    return [f"{name}={IN_MEMORY}" if name else IN_MEMORY for name in names]


def _settings(args: Args) -> dict[str, Any]:
    """Flags with their values, ours and TRL's."""
    if args is None:
        return {}
    if isinstance(args, str | Path):
        return read_yaml(Path(args).expanduser())[0]
    if isinstance(args, TrainingArguments):
        return changed_settings(args)
    if isinstance(args, Mapping):
        return plain_values(args)
    raise LoptError(
        f"args is a {type(args).__name__}; give what load_config returns, a dict of flags, the path of a YAML file, or "
        f"TRL's SFTConfig"
    )


def changed_settings(args: TrainingArguments) -> dict[str, Any]:
    """What TRL's `SFTConfig`, or `TrainingArguments`, hold that is not their own default.

    They do not know what they were given, and their defaults are not all those of this trainer; docs/trl.md names the
    ones that differ. What computes in another way than these defaults counts as it is, given or not: `bf16` and
    `gradient_checkpointing`, which TRL turns on. Flags of ours that they lack may be set as attributes:
    `args.num_stages = 4`.
    """
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        plain = type(args)(output_dir=args.output_dir, use_cpu=True)  # Otherwise it asks for a GPU.
    plain.use_cpu = False
    names = [field.name for field in dataclasses.fields(args) if field.init]
    changed = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    ours = {name: value for name, value in vars(args).items() if name in EFFECTS and not hasattr(plain, name)}
    said = plain_values({"output_dir": args.output_dir, **changed, **ours})
    flags = translate_settings(said).flags
    on = [name for name in _ON_IN_TRL if getattr(args, name, None) is getattr(plain, name, None) is True]
    return said | {name: True for name in on if not translate_settings({name: True}).flags.keys() & flags.keys()}


_ON_IN_TRL = ("bf16", "gradient_checkpointing")
"""Flags that TRL's config turns on by itself, and this trainer does not: left out, the run would compute in float32, or
need far more memory, for one who has asked for them by name."""

_ROWS = {
    "train_file": ("train_file", "dataset_name"),
    "eval_file": ("eval_file", "eval_split_size", "dataset_test_split"),
}
"""What says where rows are, by the flag that says that they are given as objects."""


def _check(flags: Mapping[str, Any], said: Mapping[str, tuple[str, Any]], is_whole: bool = False) -> None:
    """Sees that arguments and flags agree.

    Args:
        flags: of `args`.
        said: by flag, the argument that says something of it, and what.
        is_whole: whether `flags` are all flags of a config, which is not to change any more.
    """
    for flag, (argument, value) in said.items():
        for other in _ROWS.get(flag, ()):
            if flags.get(other) is not None:
                raise LoptError(f"{argument} and --{other} {_shown(flags[other])} are both given; give one of them")
        before = flags.get(flag)
        if flag not in _ROWS and before is not None and word_of(before) != word_of(value):
            raise LoptError(
                f"{argument} says --{flag} {_shown(value)}, and args say {_shown(before)}; give one of them"
            )
        if is_whole and flag in _ROWS:
            raise LoptError(f"{argument} is given, and args are a whole config; give them as a dict or a YAML file")


def _shown(value: Any) -> str:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    return value if isinstance(value, str) and len(value) < 80 else shown(value)


def most_rows(config: Config, num_replicas: int) -> int | None:
    """How many rows of a stream a run can use: None for all of them."""
    run = config.run
    if run.max_steps <= 0 or config.data.packing:
        return None
    return run.max_steps * run.per_device_train_batch_size * run.gradient_accumulation_steps * num_replicas
