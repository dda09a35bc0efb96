"""What the training loop, checkpoints and reports see of a stage, whatever its block learns from."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from lopt_pp.data import Microbatch
from lopt_pp.errors import LoptError, NotFiniteError
from lopt_pp.model.block import BlockModel, BlockOutput
from lopt_pp.objectives import Objective
from lopt_pp.objectives.task import MeasuredNextToken
from lopt_pp.stage.data_parallel import Replicas, Replicated
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.state import frozen_checksum, read_state, write_state
from lopt_pp.util.pinned import PinnedMemory
from lopt_pp.util.side_stream import Reading, SideStream

_CHECKSUM = "frozen_sha256"
"""In the saved state of a stage whose objective has frozen parameters: theirs."""

Clock = Callable[[str], contextlib.AbstractContextManager[None]]
"""Times a phase of a step, by its name, for as long as the context lasts; `lopt_pp.metrics.records` has the names."""


Measure = Callable[[BlockOutput, Microbatch], torch.Tensor]
"""Makes the summed loss of a microbatch, a float32 scalar, and notes what else is to be known of it."""


def untimed(phase: str) -> contextlib.AbstractContextManager[None]:
    """The clock of whoever wants no times."""
    return contextlib.nullcontext()


class BaseStage:
    """A block with its optimizer.

    `Stage` trains it by a loss of its own, `EndToEndStage` as a part of the whole model.

    Args:
        block: the block, with its weights.
        device: where it lives.

    Attributes:
        block: likewise.
        device: likewise.
        index: of the stage, from 0.
        objective: what the block learns from by itself; None where it only runs forward, or learns end to end.
        optimizer: of its parameters; None where nothing is trained.
        steps_done: optimizer steps so far, those before a resume included.
        replicas: the processes that hold the same stage; None if there is only this one.
        is_sharded: whether each replica holds a shard of the stage, so that all of them are needed to read its state.
        updating: held while weights change, so that another thread can save them between two steps.
        side: the stream of a GPU that the weights are read on, in whatever thread.
    """

    def __init__(self, block: BlockModel, device: torch.device | str) -> None:
        self.block = block
        self.device = torch.device(device)
        self.index = block.spec.stage
        self.objective: Objective | None = None
        self.optimizer: Optimizer | None = None
        self.steps_done = 0
        self.replicas: Replicas | None = None
        self.is_sharded = False
        self.updating = threading.Lock()
        self.side = SideStream(self.device)
        self._modules: dict[str, nn.Module] = {"block": block.model}
        """What is saved, by the prefix of its tensors."""
        self._frozen: torch.Tensor | None = None
        self._pinned = PinnedMemory() if self.device.type == "cuda" else None

    @property
    def own_dtypes(self) -> Mapping[str, torch.dtype]:
        """Of each parameter of the block, by the pretrained model's files."""
        return self.block.own_dtypes

    @property
    def learns(self) -> bool:
        """Whether the stage changes in training; otherwise it only runs forward."""
        return self.optimizer is not None

    def learned_share(self, accumulation: int) -> float:
        """Of the microbatches of a step, `accumulation` in each replica, the share that the stage learns from."""
        return 1.0

    def begin_step(self, num_learned: float) -> None:
        """Says from how many microbatches with tokens the coming step learns: the mean over replicas."""
        if self.block.balancing is not None:
            self.block.balancing.begin(num_learned)

    def router_record(self) -> dict[str, float]:
        """This replica's share of the loss by which the step has balanced routers, by name; nothing without."""
        return {} if self.block.balancing is None else self.block.balancing.record()

    @property
    def task(self) -> Objective | None:
        """What the block learns the task by, if it is the last."""
        return self.objective

    def token_record(self, num_targets: int) -> dict[str, float]:
        """This replica's share of what `--train_metrics` names, by name; nothing without. Waits for the device.

        Args:
            num_targets: that the step learns from, over all replicas.
        """
        if not isinstance(self.task, MeasuredNextToken) or not (sums := self.task.take()) or num_targets == 0:
            return {}
        values = torch.stack(list(sums.values())).tolist()
        return {name: value / num_targets for name, value in zip(sums, values, strict=True)}

    def update(self, replicated: Mapping[Replicated, bool]) -> None:
        """Makes the optimizer's step.

        Args:
            replicated: the modules that replicas train together, and whether each has learned in this step.
        """
        assert self.optimizer is not None
        with self.updating, self.side.changing(), contextlib.ExitStack() as kept:
            for module, learned in replicated.items():
                kept.enter_context(module.stepping(learned))
            self.optimizer.step()
            self.steps_done += 1

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While it lasts, the weights are as they are evaluated and saved, where the optimizer averages them."""
        if self.optimizer is None or not self.optimizer.averages:
            yield
            return
        averages = self.optimizer.evaluating()
        with self.updating, self.side.changing():
            averages.__enter__()
        try:
            yield
        finally:
            with self.updating, self.side.changing():
                averages.__exit__(None, None, None)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies, on the CPU, of all that the next step depends on. Sharded replicas must all call this."""
        with self.side.reading() as reading:
            state = read_state(self._modules, self.optimizer)
        reading.wait()
        return state | self._marks()

    def begin_copy(self, keeps: bool = True) -> tuple[dict[str, torch.Tensor], Reading]:
        """The same as `state`, which the next step need not wait for. Sharded replicas must all call this.

        Args:
            keeps: whether it is wanted here; a replica that only gives its shards holds one tensor at a time.

        Returns:
            The copies, in memory that the next call takes again, and what tells when they are whole. From a GPU they
            are made on a stream of their own, and the next change of the weights waits for them there.
        """
        with self.side.reading() as reading:
            state = read_state(self._modules, self.optimizer, keeps, self._pinned)
        marks = self._marks()
        return (state | marks if keeps else {}), reading

    def _marks(self) -> dict[str, torch.Tensor]:
        """What the state has besides tensors of the block, the objective and the optimizer."""
        checksum = self._checksum()
        return {} if checksum is None else {_CHECKSUM: checksum}

    def resume(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Goes on from what `state` gave after `steps_done` steps, in this layout of replicas or another.

        Raises:
            LoptError: it is another stage's, or what the objective holds frozen is not what it was.
        """
        # Checkpoints of versions before have no checksum.
        saved, own = state.get(_CHECKSUM), self._checksum()
        if saved is not None and own is not None and not torch.equal(saved, own):
            raise LoptError(
                f"stage {self.index}: the frozen weights of its objective are not those that the checkpoint's run had; "
                f"give the --model_name_or_path that it began with"
            )
        with self.side.changing():
            write_state(state, self._modules, self.optimizer, steps_done)
        self.steps_done = steps_done

    def _checksum(self) -> torch.Tensor | None:
        """Of what the objective holds frozen; None where it holds nothing frozen, or is let go."""
        if self.objective is not None and self._frozen is None:
            self._frozen = frozen_checksum(self._modules)  # Once: it does not change.
        return None if self.objective is None else self._frozen

    def resume_weights(self, state: Mapping[str, torch.Tensor], steps_done: int) -> None:
        """Goes on from the weights among other stages' `state`, with an optimizer and a local head that start anew.

        Raises:
            LoptError: a tensor of this stage is missing or of another shape.
        """
        with self.side.changing():
            write_state(state, {"block": self.block.model}, None, steps_done)
        if self.optimizer is not None:
            self.optimizer.resume({}, steps_done)
        self.steps_done = steps_done


def check_finite(stage: int, step: int, losses: Mapping[str, float], norm: float) -> None:
    """Sees that the losses of a step and the norm of its gradient are numbers.

    Args:
        stage: that they are of.
        step: from 0.
        losses: by what they are, such as `loss of step 3, microbatch 1`.
        norm: of the gradient.

    Raises:
        NotFiniteError: one is not; says which and what to do.
    """
    for what, value in losses.items():
        if not math.isfinite(value):
            raise NotFiniteError(
                f"stage {stage}: the {what} is {value}; a lower learning rate, --max_grad_norm or --dtype float32 may "
                f"help, or look at its rows"
            )
    if not math.isfinite(norm):
        raise NotFiniteError(f"stage {stage}: the gradient norm of step {step + 1} is {norm}; lower the learning rate")
