"""What callbacks ask a run for through their `control`, as `transformers` has it."""

import logging

from transformers import TrainerControl

from lopt_pp.config.evaluation import EvaluationConfig
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.shutdown import EVALUATE, SAVE, ask_for, ask_to_finish
from lopt_pp.distributed.world import World

logger = logging.getLogger(__name__)


def evaluates(config: EvaluationConfig) -> bool:
    """Whether a run has rows to evaluate on."""
    return any(rows is not None for rows in (config.eval_file, config.eval_split_size, config.dataset_test_split))


class Requests:
    """Hands on what callbacks ask for; called in their thread, on rank 0.

    The run finishes, evaluates or saves after the next step that no process has begun: mostly a few steps after the one
    that the callbacks were told of.

    Args:
        world: this process.
        config: of the run.
        evaluates: whether it has rows to evaluate on.
    """

    def __init__(self, world: World, config: Config, evaluates: bool) -> None:
        self._store = world.connection()
        self._can = {EVALUATE: evaluates, SAVE: config.checkpoint.saves}
        self._is_over = self._has_told_of_epochs = False

    def __call__(self, step: int, control: TrainerControl) -> None:
        if control.should_training_stop and not self._is_over:
            self._is_over = True
            ask_to_finish(self._store, f"a callback has asked for it after step {step}")
        if control.should_epoch_stop and not self._has_told_of_epochs:
            self._has_told_of_epochs = True
            logger.warning(
                "a callback sets should_epoch_stop after step %d: no epoch is cut short here, since which rows a step "
                "has goes by its number alone; it is passed over (should_training_stop ends the run)",
                step,
            )
        wanted = (control.should_evaluate and EVALUATE, control.should_save and SAVE)
        what = sum(one for one in wanted if one and self._may(one))
        if what:
            ask_for(self._store, what)

    def _may(self, what: int) -> bool:
        """Whether the run can do so; a warning says once that it cannot."""
        if self._can.get(what) is False:
            self._can.pop(what)
            asked, lacks = (
                ("an evaluation", "there are no rows to evaluate on")
                if what == EVALUATE
                else ("a checkpoint", "--save_steps 0 turns checkpoints off")
            )
            logger.warning("a callback asks for %s, and %s: it is passed over", asked, lacks)
        return what in self._can
