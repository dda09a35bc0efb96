"""Training from Python: what `python -m lopt_pp.train` does, for scripts and notebooks, as TRL's trainer looks."""

import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lopt_pp.checkpoint.output_dir import holds_whole_model
from lopt_pp.checkpoint.resume import LATEST
from lopt_pp.config.train_config import Config
from lopt_pp.data.in_memory import AnyRows, Formatting, GivenRows, raw_rows
from lopt_pp.data.presets import find_reader
from lopt_pp.distributed.world import World, rank_and_size
from lopt_pp.errors import LoptError
from lopt_pp.objectives import local_objective_class
from lopt_pp.training.arguments import Args, config_of, most_rows, refuse
from lopt_pp.training.finish import RunFinalizer
from lopt_pp.training.given import Given, check_tokenizer, find_tokenizer
from lopt_pp.training.run import run
from lopt_pp.training.session import RunError, run_watched

__all__ = ["RunError", "Trainer"]


class Trainer:
    """Trains a model: in this process alone, or in all processes of a script that a launcher has started.

    Its arguments are those of TRL's `SFTTrainer`, in their order; or there is one, a config of `load_config`, which
    names everything. Every process makes one of the same arguments and calls `train`. What `train` logs goes to the
    logger `lopt_pp`.

    Args:
        model: a causal language model that `transformers` has loaded; or its directory or hub id. A loaded one is
            trained as it is, with what was changed in it since. Or a config that names all there is to say.
        args: flags of `lopt-pp train`: what `load_config` returns, a dict, the path of a YAML file, or TRL's
            `SFTConfig`, of which what differs from its own defaults is taken. None is for the defaults.
        data_collator: refused, as there is none.
        train_dataset: rows to train on, of any kind that files may have: a `datasets.Dataset`; an `IterableDataset`,
            whose rows are read before the first step, so it must end, or `max_steps` must say how many are wanted; or a
            list of dicts. None where flags name them.
        eval_dataset: rows to evaluate on, likewise.
        processing_class: the tokenizer; None for that of the model. It stays as it is.
        compute_loss_func: refused; objectives are there for that.
        preprocess_logits_for_metrics: refused; there are no logits.
        quantization_config: refused.
        peft_config: refused; there are no adapters yet.
        formatting_func: makes the text to train on of each row.

    Attributes:
        config: the flags.
        rank: of this process; 0 where it is the only one.
        name: of this process in messages, such as `stage 0 (rank 0)`.

    Raises:
        LoptError: an argument or a flag cannot be used, or the processes that there are do not fit the config.
    """

    _has_joined: ClassVar[bool] = False
    """Whether this process has joined others before; the rendezvous serves once."""

    def __init__(
        self,
        model: Config | PreTrainedModel | str | Path | None = None,
        args: Args = None,
        data_collator: object = None,
        train_dataset: AnyRows | None = None,
        eval_dataset: AnyRows | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: object = None,
        preprocess_logits_for_metrics: object = None,
        quantization_config: object = None,
        peft_config: object = None,
        formatting_func: Formatting | None = None,
    ) -> None:
        refuse(
            data_collator=data_collator,
            compute_loss_func=compute_loss_func,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
        )
        self.config = config_of(model, args, has_rows=train_dataset is not None, has_held_out=eval_dataset is not None)
        # Whether there is such code of the user's own.
        local_objective_class(self.config.objective)
        find_reader(self.config.data.dataset_mapping, self.config.data.dataset_text_field)
        self.rank, self._size = rank_and_size()
        self._topology = self.config.topology(self._size)
        self.name = self._topology.name_of(self.rank)
        most = most_rows(self.config, self._topology.num_replicas)
        self._given = Given(
            model=model if isinstance(model, PreTrainedModel) else None,
            tokenizer=None if processing_class is None else check_tokenizer(processing_class),
            rows=GivenRows(
                train=None if train_dataset is None else raw_rows(train_dataset, "train_dataset", most),
                held_out={} if eval_dataset is None else {"": raw_rows(eval_dataset, "eval_dataset")},
                formatting_func=formatting_func,
            ),
        )
        self._model: PreTrainedModel | None = self._given.model

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> bool:
        """Trains, and leaves the model in the output directory.

        SIGTERM, SIGINT and SIGUSR1 stop the run in good order meanwhile, where this is the main thread: Python lets no
        other one take signals. Where there are several processes, a failure ends all of them, with one line that says
        why, and `train` does not return.

        Args:
            resume_from_checkpoint: a checkpoint's directory to go on from, or True for the newest one in the output
                directory; None for what the flags say.

        Returns:
            Whether the model is there; False where a signal has stopped the run, which can go on from its checkpoint.

        Raises:
            RunError: the run has failed, and this process is the only one.
            LoptError: the processes cannot join each other, or have done so before.
        """
        if self._size > 1 and Trainer._has_joined:
            raise LoptError("processes that torchrun has started can train once; start others for the next run")
        Trainer._has_joined = self._size > 1
        config = _resumed(self.config, resume_from_checkpoint)

        def work(world: World, on_prepared: Callable[[RunFinalizer], None], held: ExitStack) -> bool:
            return run(config, world, on_prepared, held, self._given)

        has_finished = run_watched(config, self._topology, work)
        self._model = self._given.model if self._size == 1 else None
        return has_finished

    @property
    def model(self) -> PreTrainedModel:
        """The model, an ordinary one of `transformers`.

        Where this process is the only one and was given a loaded model, it is that one: `train` leaves its weights
        there. Otherwise it is the trained model, read from the output directory to main memory where it is first asked
        for: all of it, whatever the process has trained, so mostly one asks for it on rank 0 alone.

        Raises:
            LoptError: it is not there.
        """
        if self._model is None:
            path = Path(self.config.run.output_dir)
            if not holds_whole_model(path):
                raise LoptError(f"--output_dir {path} has no trained model; train() puts it there when it returns True")
            self._model = AutoModelForCausalLM.from_pretrained(
                path, trust_remote_code=self.config.model.trust_remote_code
            )
        return self._model

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Saves the model with its tokenizer and model card into another directory, as `transformers` does.

        Rank 0 writes; the other processes return at once.

        Args:
            output_dir: made if it is missing; None for that of the run, where `train` has put the model already.

        Raises:
            LoptError: the model is not there.
        """
        source = Path(self.config.run.output_dir)
        if self.rank != 0 or output_dir is None or Path(output_dir).resolve() == source.resolve():
            if not holds_whole_model(source):
                raise LoptError(f"--output_dir {source} has no trained model; train() puts it there")
            return
        self.model.save_pretrained(output_dir)
        find_tokenizer(self.config.model, self.config.data, self._given.tokenizer).save_pretrained(output_dir)
        if (source / "README.md").exists():
            shutil.copy(source / "README.md", output_dir)


def _resumed(config: Config, which: str | Path | bool | None) -> Config:
    """The config of a run that goes on from a checkpoint, as `transformers` names it in `train`."""
    if which is None or which is False:
        return config
    wanted = LATEST if which is True else str(which)
    return replace(config, checkpoint=replace(config.checkpoint, resume_from_checkpoint=wanted))
