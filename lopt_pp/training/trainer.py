"""Training from Python: what `python -m lopt_pp.train` does, for scripts and notebooks, as TRL's trainer looks."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerState,
)
from transformers.utils import is_in_notebook

from lopt_pp.checkpoint.output_dir import holds_whole_model
from lopt_pp.config.train_config import Config
from lopt_pp.data.in_memory import AnyRows, Formatting, rows_of, sets_of, training_rows
from lopt_pp.data.presets import find_reader
from lopt_pp.distributed.slurm import rank_and_size
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError
from lopt_pp.metrics.listeners import OwnCallbacks
from lopt_pp.model.in_memory import check_trainable
from lopt_pp.objectives import local_objective_class
from lopt_pp.training.arguments import Args, callbacks_of, config_of, most_rows, refuse
from lopt_pp.training.as_transformers import NamesOfTransformers
from lopt_pp.training.evaluating import evaluate, on_rows, tell_of_evaluation
from lopt_pp.training.finish import RunFinalizer
from lopt_pp.training.given import Given, check_tokenizer, find_tokenizer
from lopt_pp.training.own_metrics import ComputeMetrics
from lopt_pp.training.own_optimizer import ClassAndSettings, own_optimizer
from lopt_pp.training.requests import Requests, evaluates
from lopt_pp.training.result import RunResult, TrainResult, summarize
from lopt_pp.training.resuming import check_resumable, resumed
from lopt_pp.training.run import run
from lopt_pp.training.script_state import current_directory, gradients_on
from lopt_pp.training.session import RunError, run_watched

if TYPE_CHECKING:
    from lopt_pp.metrics.callbacks import Callbacks

__all__ = ["RunError", "TrainResult", "Trainer"]

AnyCallback: TypeAlias = TrainerCallback | type[TrainerCallback]


class Trainer(NamesOfTransformers):
    """Trains a model: in this process alone, or in all processes of a script that a launcher has started.

    Its arguments are those of TRL's `SFTTrainer`, in their order; or there is one, a config of `load_config`, which
    names everything. Every process makes one of the same arguments and calls `train`. What `train` logs goes to the
    logger `lopt_pp`.

    Args:
        model: a causal language model that `transformers` has loaded; or its directory or hub id. A loaded one is
            trained as it is, with what was changed in it since. Or a config that names all there is to say.
        args: flags of `lopt-pp train`: what `load_config` returns, a dict, the path of a YAML file, or TRL's
            `SFTConfig`: see docs/trl.md for what of it counts. None is for the defaults.
        data_collator: refused, as there is none.
        train_dataset: rows to train on, of any kind that files may have: a `datasets.Dataset`; an `IterableDataset`,
            whose rows are read before the first step, so it must end, or `max_steps` must say how many are wanted; or a
            list of dicts. None where flags name them.
        eval_dataset: rows to evaluate on, likewise; or several sets of them, by their names.
        processing_class: the tokenizer; None for that of the model. It stays as it is.
        compute_loss_func: refused; objectives are there for that.
        compute_metrics: makes metrics of evaluations, from each token's likeliest and loss: see docs/evaluation.md.
        callbacks: of `transformers`, objects or classes. Rank 0 calls them, once all stages have reported a step; what
            they ask for by their `control` holds for the whole run, and is done after the next step that no process has
            begun. A run that they stop finishes there: its model is saved.
        optimizers: a class of optimizers, or a function that makes one of a stage's groups of parameters, as each stage
            has its own; alone, or in the first place of a pair as TRL has it. None for what `--optim` says.
        optimizer_cls_and_kwargs: a class with its settings, likewise. Its `lr` and `weight_decay` are those of `args`.
        preprocess_logits_for_metrics: refused; there are no logits.
        quantization_config: refused.
        peft_config: refused; there are no adapters yet.
        formatting_func: makes the text to train on of each row.

    Attributes:
        config: the flags.
        rank: of this process; 0 where it is the only one.
        name: of this process in messages, such as `stage 0 (rank 0)`.
        state: as `transformers` has it. While a run trains, rank 0 has it in its callbacks; afterwards all processes
            that share the output directory have what was logged, `state.log_history`, and `state.best_metric`.

    Raises:
        LoptError: an argument or a flag cannot be used, or the processes that there are do not fit the config.
    """

    def __init__(
        self,
        model: Config | PreTrainedModel | str | Path | None = None,
        args: Args = None,
        data_collator: object = None,
        train_dataset: AnyRows | None = None,
        eval_dataset: AnyRows | Mapping[str, AnyRows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: object = None,
        compute_metrics: ComputeMetrics | None = None,
        callbacks: Sequence[AnyCallback] | None = None,
        optimizers: object = None,
        optimizer_cls_and_kwargs: ClassAndSettings | None = None,
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
        held_out = sets_of(eval_dataset)
        optimizer, settings = own_optimizer(optimizers, optimizer_cls_and_kwargs)
        self.config = config_of(model, args, train_dataset is not None, list(held_out), settings)
        # Whether there is such code of the user's own.
        local_objective_class(self.config.objective)
        find_reader(self.config.data.dataset_mapping, self.config.data.dataset_text_field)
        self.rank, self._size = rank_and_size()
        self._topology = self.config.topology(self._size)
        self.name = self._topology.name_of(self.rank)
        train = training_rows(train_dataset, most_rows(self.config, self._topology.num_replicas), formatting_func)
        self._given = Given(
            model=model if isinstance(model, PreTrainedModel) else None,
            tokenizer=None if processing_class is None else check_tokenizer(processing_class),
            rows=replace(train, held_out=rows_of(held_out)),
            optimizer=optimizer,
            compute_metrics=compute_metrics,
        )
        self._model: PreTrainedModel | None = self._given.model
        self._has_trained = False
        self._directory = current_directory()
        self.state = TrainerState()
        self.callbacks = callbacks_of(callbacks)
        if is_in_notebook():
            from transformers.utils.notebook import NotebookProgressCallback  # It needs IPython.

            self.add_callback(NotebookProgressCallback)

    def add_callback(self, callback: AnyCallback) -> None:
        """Adds a callback, an object or its class, for the next call of `train`."""
        self.callbacks += callbacks_of([callback])

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

        SIGTERM, SIGINT, SIGUSR1 and SIGHUP stop the run in good order meanwhile, where this is the main thread: Python
        lets no other one take signals. Where there are several processes, a failure ends all of them, with one
        line that says why, and `train` does not return.

        Args:
            resume_from_checkpoint: a checkpoint's directory to go on from, or True for the newest one in the output
                directory, which must be there, as in `transformers`; None for what the flags say.

        Returns:
            `global_step`, `training_loss` (the last stage's, the mean over the steps of this call, 0.0 without
            any) and `metrics`, as `transformers` does. It is true where the model is there, and false where a signal
            has stopped the run, which can go on from its checkpoint.

        Raises:
            RunError: the run has failed, and this process is the only one.
            LoptError: weights of the model are frozen, or the processes cannot join each other.
        """
        config = self.where_it_was(resumed(self.config, resume_from_checkpoint))
        if self._given.model is not None:
            check_trainable(self._given.model)
        begun = time.perf_counter()

        def opened(driver: "Callbacks") -> None:
            self.state = driver.state

        def work(world: World, on_prepared: Callable[[RunFinalizer], None], held: ExitStack) -> RunResult:
            if resume_from_checkpoint is True:
                check_resumable(config, world)
            requests = Requests(world, config, evaluates(config.evaluation))
            own = OwnCallbacks(self.callbacks, requests, opened) if self.callbacks else None
            return run(config, world, on_prepared, held, replace(self._given, callbacks=own))

        with gradients_on():
            result = run_watched(config, self._topology, work)
        self._has_trained = result.has_finished
        self._model = self._given.model if self._size == 1 else None
        return summarize(config, result, time.perf_counter() - begun, self.state)

    def evaluate(
        self, eval_dataset: AnyRows | Mapping[str, AnyRows] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measures the model on held-out rows: before `train` the pretrained one, afterwards the trained one.

        All processes must call this.

        Args:
            eval_dataset: rows to evaluate on, as the trainer takes them; None for its own.
            metric_key_prefix: what names begin with.

        Returns:
            Numbers by name, such as `eval_loss`, `eval_perplexity` and `eval_runtime`; of the last stage, which has the
            task's loss.

        Raises:
            RunError: it has failed, and this process is the only one.
            LoptError: there are no such rows.
        """
        config, given = self.where_it_was(self.config), self._given
        if eval_dataset is not None:
            config, given = on_rows(config, given, eval_dataset)
        if self._has_trained and (given.model is None or self._size > 1):
            trained = replace(config.model, model_name_or_path=config.run.output_dir, model_revision="main")
            config, given = replace(config, model=trained), replace(given, model=None)
        metrics = run_watched(config, self._topology, lambda world, *_: evaluate(config, world, given))
        metrics = {name.replace("eval", metric_key_prefix, 1): value for name, value in metrics.items()}
        self.state.log_history.append(metrics | {"step": self.state.global_step})
        if self.callbacks and self.rank == 0:
            tell_of_evaluation(self.callbacks, config, self.state, metrics)
        return metrics

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
            path = self.output_dir
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
        source = self.output_dir
        if self.rank != 0 or output_dir is None or Path(output_dir).resolve() == source.resolve():
            if not holds_whole_model(source):
                raise LoptError(f"--output_dir {source} has no trained model; train() puts it there")
            return
        self.model.save_pretrained(output_dir)
        config = self.where_it_was(self.config)
        find_tokenizer(config.model, config.data, self._given.tokenizer).save_pretrained(output_dir)
        if (source / "README.md").exists():
            shutil.copy(source / "README.md", output_dir)
