"""Measures the losses on held-out rows while a run goes on: forward only, one way, without a barrier.

At an evaluation step every stage makes its optimizer step, and then runs the held-out rows forward before its next one.
Their hidden states are further messages of that step on the same stream. So each stage measures what the sequential
algorithm has after that step, waits for nobody longer than the forward passes take, and trains on with the same bits.

The evaluation before the first step is that of a step before it, `START`, which trains nothing: its messages are the
held-out rows' alone.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PreTrainedTokenizerBase

from lopt_pp.data import DataConfig, DataOrder, Microbatch, Rows, TokenCounts, TokenizedRows, load_rows
from lopt_pp.data.rows import PackedRows
from lopt_pp.errors import LoptError, renamed_in_errors
from lopt_pp.flags import check_types
from lopt_pp.metrics import Record, StageClock
from lopt_pp.seeds import derive_seed
from lopt_pp.stage import Stage
from lopt_pp.stream import Receiver, Sender

START = -1
"""The step before the first, where a run is evaluated at its start. It has no microbatches, and changes nothing."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What a run is measured on, and when.

    Raises:
        LoptError: a value is out of range, or flags do not go together.
    """

    _argument_group_name: ClassVar[str] = "Evaluation"

    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "Local file with rows that are not trained on, of the same kinds as --train_file: their loss and "
            "perplexity are measured every --eval_steps and after the last step."
        },
    )
    eval_split_size: float | None = field(
        default=None,
        metadata={
            "help": "Instead of --eval_file, hold this many of the training rows out (a whole number), or this share "
            "of them (below 1), drawn by the seed."
        },
    )
    dataset_test_split: str | None = field(
        default=None, metadata={"help": "Instead of --eval_file, a split of --dataset_name, such as `test`."}
    )
    eval_steps: int = field(
        default=500, metadata={"help": "Steps between evaluations; 0 evaluates after the last step only."}
    )
    eval_on_start: bool = field(
        default=False,
        metadata={
            "help": "Evaluate before the first step as well, as step 0: what the pretrained model does, to compare "
            "with. A run that goes on from a checkpoint does not evaluate it again."
        },
    )
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Rows of a microbatch of an evaluation."})
    load_best_model_at_end: bool = field(
        default=False,
        metadata={
            "help": "Save the model of the checkpoint with the lowest eval_loss (or the last step's, if its is the "
            "lowest) instead of the last. --save_steps must be a multiple of --eval_steps. --save_total_limit never "
            "removes the best checkpoint."
        },
    )

    def __post_init__(self) -> None:
        check_types(self)
        sources = ("eval_file", "eval_split_size", "dataset_test_split")
        given = [f"--{name}" for name in sources if getattr(self, name) is not None]
        if len(given) > 1:
            raise LoptError(f"give one of {' and '.join(given)}: a run is evaluated on the rows of one")
        if self.eval_steps < 0:
            raise LoptError(f"--eval_steps {self.eval_steps}: at least 0")
        if self.per_device_eval_batch_size < 1:
            raise LoptError(f"--per_device_eval_batch_size {self.per_device_eval_batch_size}: at least 1")
        size = self.eval_split_size
        if size is not None and (size <= 0 or (size >= 1 and size != int(size))):
            raise LoptError(
                f"--eval_split_size {size:g}: a number of rows such as 100, or a share of them such as 0.05"
            )
        if self.load_best_model_at_end and not given:
            raise LoptError("--load_best_model_at_end needs rows to compare models on: give --eval_file")
        if self.eval_on_start and not given:
            raise LoptError(
                "--eval_on_start needs rows to evaluate on: give --eval_file, --eval_split_size or --dataset_test_split"
            )

    def check_checkpoints(self, save_steps: int) -> None:
        """Sees that the best model can be had at the end.

        Raises:
            LoptError: some checkpoint would not be evaluated.
        """
        if self.load_best_model_at_end and (save_steps == 0 or self.eval_steps == 0 or save_steps % self.eval_steps):
            raise LoptError(
                f"--load_best_model_at_end evaluates every checkpoint, so --save_steps must be a multiple of "
                f"--eval_steps; they are {save_steps} and {self.eval_steps}"
            )


def load_split(
    config: EvaluationConfig, data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[Rows, TokenizedRows | None]:
    """Reads the rows to train on, and those to evaluate on; None where a run is not evaluated.

    The latter are neither packed nor streamed: each counts, and they are few.

    Args:
        config: of the evaluation.
        data: of the training rows; those of a file or a split are read in the same way.
        tokenizer: of the model.
        seed: that draws the rows which `eval_split_size` holds out.

    Raises:
        LoptError: rows cannot be read, none of them can be used, or nothing would be left to train on.
    """
    plain = dataclasses.replace(data, streaming=False, packing=False, padding_free=False)
    if (size := config.eval_split_size) is not None:
        if data.streaming:
            raise LoptError(
                "--eval_split_size must know which rows can be used, as --streaming does not; give --eval_file"
            )
        kept, held = _draw(_load(plain, tokenizer), size, seed)
        return (PackedRows(kept, data.max_length) if data.packing else kept), held
    rows = load_rows(data, tokenizer)
    if config.eval_file is not None:
        source = dataclasses.replace(plain, train_file=[config.eval_file], dataset_name=None, dataset_config=None)
        with renamed_in_errors("--train_file", "--eval_file"):
            return rows, _load(source, tokenizer)
    if config.dataset_test_split is not None:
        if data.dataset_name is None:
            raise LoptError(f"--dataset_test_split {config.dataset_test_split} is a split of --dataset_name; give that")
        with renamed_in_errors("--dataset_split", "--dataset_test_split"):
            return rows, _load(dataclasses.replace(plain, dataset_split=config.dataset_test_split), tokenizer)
    return rows, None


def _load(plain: DataConfig, tokenizer: PreTrainedTokenizerBase) -> TokenizedRows:
    rows = load_rows(plain, tokenizer)
    assert isinstance(rows, TokenizedRows)
    return rows


def _draw(rows: TokenizedRows, size: float, seed: int) -> tuple[TokenizedRows, TokenizedRows]:
    """The rows to train on and those that are held out, each in the order of the data."""
    number = int(size) if size >= 1 else round(size * len(rows))
    if not 1 <= number < len(rows):
        raise LoptError(
            f"--eval_split_size {size:g} holds {number} of the {len(rows)} usable rows of {rows.source} out; hold 1 or "
            f"more out, and leave some to train on"
        )
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(derive_seed(seed)))
    held, kept = (part.sort().values.numpy() for part in (drawn[:number], drawn[number:]))
    return rows.select(kept, "held out by --eval_split_size"), rows.select(held, "to train on")


class Evaluation:
    """The held-out rows as microbatches, and the steps after which they are run. The same in every process.

    Args:
        rows: that are not trained on.
        eval_steps: steps between evaluations; 0 for the last step only.
        num_steps: of the run.
        on_start: whether they are run before the first step, too.
        per_device_eval_batch_size: rows of a microbatch.
        pad_token_id: the id that pads them.
        replica: whose microbatches these are.
        num_replicas: that share the rows.

    Attributes:
        counts: tokens of all the rows, over all replicas.
        shapes: the (rows, tokens) of each of this replica's microbatches.
    """

    def __init__(
        self,
        rows: TokenizedRows,
        *,
        eval_steps: int,
        num_steps: int,
        per_device_eval_batch_size: int,
        pad_token_id: int,
        on_start: bool = False,
        replica: int = 0,
        num_replicas: int = 1,
    ) -> None:
        self._eval_steps = eval_steps
        self._num_steps = num_steps
        self._on_start = on_start
        # One pass, in the order of the file. A step of this order is one microbatch of each replica.
        self._order = DataOrder(
            rows,
            per_device_train_batch_size=per_device_eval_batch_size,
            gradient_accumulation_steps=1,
            shuffle=False,
            seed=0,
            pad_token_id=pad_token_id,
            replica=replica,
            num_replicas=num_replicas,
            sampling="random",
        )
        parts = range(self._order.steps_per_epoch)
        counts = [self._order.counts(part) for part in parts]
        self.counts = TokenCounts(sum(part.num_tokens for part in counts), sum(part.num_targets for part in counts))
        self.shapes = [shape for part in parts for shape in self._order.shapes(part)]

    def is_due(self, steps_done: int) -> bool:
        """Whether the rows are run when `steps_done` steps are done; 0 are after `START`."""
        if steps_done == 0:
            return self._on_start
        return steps_done == self._num_steps or (self._eval_steps > 0 and steps_done % self._eval_steps == 0)

    def microbatches(self) -> Iterator[Microbatch]:
        """This replica's microbatches, one after another, on the CPU."""
        for part in range(self._order.steps_per_epoch):
            yield from self._order.microbatches(part)


def evaluate(
    stages: Sequence[Stage],
    receivers: Mapping[int, Receiver],
    senders: Mapping[int, Sender],
    clocks: Mapping[int, StageClock],
    evaluation: Evaluation,
) -> dict[int, Record]:
    """Runs the held-out rows through the stages of this process, forward only.

    Args:
        stages: in order; they are as they were afterwards.
        receivers: by stage, the end of the boundary before it.
        senders: by stage, the end of the boundary after it.
        clocks: by stage.
        evaluation: the rows.

    Returns:
        By stage, this replica's share of the mean loss over the rows, under the loss's name with `eval_` before it;
        nothing of a stage that has no loss.
    """
    losses: dict[int, list[torch.Tensor]] = {stage.index: [] for stage in stages}
    with ExitStack() as stack:
        for stage in stages:
            stack.enter_context(stage.evaluating())
        for host_batch in evaluation.microbatches():
            for stage in stages:
                clock, batch = clocks[stage.index], host_batch.to(stage.device)
                with clock("wait_receive"):
                    hidden_states = receivers[stage.index].receive() if stage.index in receivers else None
                with clock("eval"):
                    output = stage.forward(batch, hidden_states)
                if stage.index in senders:
                    with clock("wait_send"):
                        senders[stage.index].send(stage.outgoing(output))
                if stage.objective is not None:
                    with clock("eval"):
                        losses[stage.index].append(stage.summed_loss(output, batch))
                del output, hidden_states
    return {
        stage.index: {f"eval_{stage.objective.name}": mean_loss(losses[stage.index], stage.count(evaluation.counts))}
        for stage in stages
        if stage.objective is not None
    }


def mean_loss(sums: Sequence[torch.Tensor], count: int) -> float:
    """The mean loss of microbatches, from their sums: added up in float64, since there may be many."""
    return torch.stack(list(sums)).double().sum().item() / max(count, 1)
