"""Names of `transformers.Trainer` that a `Trainer` has for scripts, and what it says of those that it has not."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt_pp.checkpoint.output_dir import holds_whole_model
from lopt_pp.config.train_config import Config
from lopt_pp.errors import LoptError
from lopt_pp.hub.push import push
from lopt_pp.training.script_state import anchored

logger = logging.getLogger(__name__)

_LOSS = "what a block learns from is an objective (docs/objectives.md)"
_OPTIMIZER = "give optimizers, or optimizer_cls_and_kwargs"
_ROWS = "flags say how rows become batches (--packing, --per_device_train_batch_size)"
_FILES = "metrics.jsonl, run.json and state.log_history have what a run has logged"
_TOKENIZER = "the output directory has the run's: AutoTokenizer.from_pretrained(trainer.config.run.output_dir)"

INSTEAD = {
    "predict": "evaluate(rows) measures rows, and compute_metrics is given the likeliest tokens; "
    "trainer.model.generate(...) or `lopt-pp generate` answers",
    "args": "the flags are trainer.config",
    "accelerator": "trainer.rank says which process this is",
    "processing_class": _TOKENIZER,
    "tokenizer": _TOKENIZER,
    "log": _FILES,
    "log_metrics": _FILES,
    "save_metrics": _FILES,
    "save_state": _FILES,
    "create_model_card": "train() writes README.md",
    "hyperparameter_search": "make a Trainer for each choice, and compare by `lopt-pp compare`",
    "compute_loss": _LOSS,
    "compute_loss_func": _LOSS,
    "training_step": _LOSS,
    "prediction_step": "evaluations measure the task's loss, and compute_metrics the rest",
    "evaluation_loop": "evaluations measure the task's loss, and compute_metrics the rest",
    "create_optimizer": _OPTIMIZER,
    "create_optimizer_and_scheduler": _OPTIMIZER,
    "create_scheduler": "--lr_scheduler_type and --lr_scheduler_kwargs say it",
    "optimizer": "each stage has its own; " + _OPTIMIZER,
    "lr_scheduler": "each stage has its own; --lr_scheduler_type and --lr_scheduler_kwargs say it",
    "get_train_dataloader": _ROWS,
    "get_eval_dataloader": _ROWS,
    "get_batch_samples": _ROWS,
}
"""By the names of `transformers.Trainer` that are not here: what does the same."""


class NamesOfTransformers:
    """What a `Trainer` has besides its own methods.

    Attributes:
        config: the flags.
        rank: of this process.
    """

    config: Config
    rank: int
    _directory: Path | None
    """The current one when it was made; None where that is not known."""

    def __init_subclass__(cls) -> None:
        """Refuses a subclass that replaces what is never called here.

        Raises:
            LoptError: says what to do instead.
        """
        super().__init_subclass__()
        for name in vars(cls):
            if name in INSTEAD:
                raise LoptError(f"{cls.__name__}.{name} would never be called: {INSTEAD[name]}")

    if not TYPE_CHECKING:  # A type checker knows what is missing without it.

        def __getattr__(self, name: str) -> Any:
            hint = f": {INSTEAD[name]}" if name in INSTEAD else ""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def is_world_process_zero(self) -> bool:
        """Whether this process is that of rank 0."""
        return self.rank == 0

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: object,
    ) -> str | None:
        """Pushes the trained model to the hub, where `--hub_model_id` and the other flags of it say.

        Rank 0 pushes, and waits for the end in any case; the other processes return at once. The arguments are those of
        `transformers`; what would go to a model card has no effect, as the run has written its own.

        Returns:
            The page of the model; None on the other processes.

        Raises:
            LoptError: the model is not there, or cannot be pushed.
        """
        if self.rank != 0:
            return None
        output_dir, config = self.output_dir, self.config
        if not holds_whole_model(output_dir):
            raise LoptError(f"--output_dir {output_dir} has no trained model to push; train() puts it there")
        if card:
            logger.warning("push_to_hub: of no effect here: %s; the run has written its model card", ", ".join(card))
        given: dict[str, Any] = {"hub_token": token, "hub_revision": revision, "hub_private_repo": private}
        own = replace(config.hub, **{name: value for name, value in given.items() if value is not None})
        return push(output_dir, own, commit_message or "End of training", config.model.trust_remote_code)

    def where_it_was(self, config: Config) -> Config:
        """A config with the paths that it had when this was made, wherever the script has gone since."""
        return anchored(config, self._directory)

    @property
    def output_dir(self) -> Path:
        """That of the run, wherever the script has gone since."""
        return Path(self.where_it_was(self.config).run.output_dir)
