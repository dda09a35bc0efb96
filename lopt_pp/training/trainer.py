"""Training from Python: what `python -m lopt_pp.train` does, for scripts and notebooks, as TRL's trainer looks."""

import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.utils import is_in_notebook

from lopt_pp.checkpoint.output_dir import holds_whole_model
from lopt_pp.checkpoint.resume import LATEST
from lopt_pp.config.train_config import Config
from lopt_pp.data.in_memory import AnyRows, Formatting, GivenRows, raw_rows
from lopt_pp.data.presets import find_reader
from lopt_pp.distributed.world import World, rank_and_size
from lopt_pp.errors import LoptError
from lopt_pp.metrics.history import log_history, mean_loss, read_records
from lopt_pp.metrics.listeners import OwnCallbacks
from lopt_pp.objectives import local_objective_class
from lopt_pp.training.arguments import Args, config_of, most_rows, refuse
from lopt_pp.training.finish import RunFinalizer
from lopt_pp.training.given import Given, check_tokenizer, find_tokenizer
from lopt_pp.training.requests import Requests, evaluates
from lopt_pp.training.result import RunResult, TrainResult
from lopt_pp.training.run import run
from lopt_pp.training.session import RunError, run_watched

if TYPE_CHECKING:
    from lopt_pp.metrics.callbacks import Callbacks

__all__ = ["RunError", "TrainResult", "Trainer"]

AnyCallback: TypeAlias = TrainerCallback | type[TrainerCallback]


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
        callbacks: of `transformers`, objects or classes. Rank 0 calls them, once all stages have reported a step; what
            they ask for by their `control` holds for the whole run, and is done after the next step that no process has
            begun. A run that they stop finishes there: its model is saved.
        preprocess_logits_for_metrics: refused; there are no logits.
        quantization_config: refused.
        peft_config: refused; there are no adapters yet.
        formatting_func: makes the text to train on of each row.

    Attributes:
        config: the flags.
        rank: of this process; 0 where it is the only one.
        name: of this process in messages, such as `stage 0 (rank 0)`.
        state: as `transformers` has it. While a run trains, rank 0 has it in its callbacks; afterwards all processes
            that share the output directory have what was logged, `state.log_history`.

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
        callbacks: Sequence[AnyCallback] | None = None,
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
        self.state = TrainerState()
        self.callbacks: list[TrainerCallback] = []
        for callback in callbacks or ():
            self.add_callback(callback)
        if is_in_notebook():
            from transformers.utils.notebook import NotebookProgressCallback  # It needs IPython.

            self.add_callback(NotebookProgressCallback)

    def add_callback(self, callback: AnyCallback) -> None:
        """Adds a callback, an object or its class, for the next call of `train`."""
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def pop_callback(self, callback: AnyCallback) -> TrainerCallback | None:
        """Takes a callback, or the first of a class, off the list; returns it, or None where it is not there."""
        kind = callback if isinstance(callback, type) else None
        found = next((own for own in self.callbacks if (isinstance(own, kind) if kind else own == callback)), None)
        if found is not None:
            self.callbacks.remove(found)
        return found

    def remove_callback(self, callback: AnyCallback) -> None:
        """Takes a callback, or the first of a class, off the list."""
        self.pop_callback(callback)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> TrainResult:
        """Trains, and leaves the model in the output directory.

        SIGTERM, SIGINT and SIGUSR1 stop the run in good order meanwhile, where this is the main thread: Python lets no
        other one take signals. Where there are several processes, a failure ends all of them, with one line that says
        why, and `train` does not return.

        Args:
            resume_from_checkpoint: a checkpoint's directory to go on from, or True for the newest one in the output
                directory; None for what the flags say.

        Returns:
            `global_step`, `training_loss` (the last stage's, the mean over the steps of this call) and `metrics`, as
            `transformers` does. It is true where the model is there, and false where a signal has stopped the run,
            which can go on from its checkpoint.

        Raises:
            RunError: the run has failed, and this process is the only one.
            LoptError: the processes cannot join each other, or have done so before.
        """
        if self._size > 1 and Trainer._has_joined:
            raise LoptError("processes that torchrun has started can train once; start others for the next run")
        Trainer._has_joined = self._size > 1
        config = _resumed(self.config, resume_from_checkpoint)

        begun = time.perf_counter()

        def opened(driver: "Callbacks") -> None:
            self.state = driver.state

        def work(world: World, on_prepared: Callable[[RunFinalizer], None], held: ExitStack) -> RunResult:
            requests = Requests(world, config, evaluates(config.evaluation))
            own = OwnCallbacks(self.callbacks, requests, opened) if self.callbacks else None
            return run(config, world, on_prepared, held, replace(self._given, callbacks=own))

        result = run_watched(config, self._topology, work)
        self._model = self._given.model if self._size == 1 else None
        return self._note(result, time.perf_counter() - begun)

    def _note(self, result: RunResult, seconds: float) -> TrainResult:
        """Brings `state` up to date, and makes what `train` returns."""
        records = read_records(Path(self.config.run.output_dir) / "metrics.jsonl", result.steps_done)
        loss = mean_loss(records, result.steps_before)
        history = log_history(records, result.steps_done, self.config.run.logging_steps)
        epoch = next((logs["epoch"] for logs in reversed(history) if "epoch" in logs), 0.0)
        steps = result.steps_done - result.steps_before
        metrics = {"train_runtime": seconds, "train_steps_per_second": steps / seconds, "train_loss": loss}
        history.append(metrics | {"epoch": epoch, "step": result.steps_done})
        self.state.global_step, self.state.epoch, self.state.log_history = result.steps_done, epoch, history
        returned = TrainResult(result.steps_done, loss, metrics | {"epoch": epoch})
        returned.has_finished = result.has_finished
        return returned

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
