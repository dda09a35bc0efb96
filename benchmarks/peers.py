"""Ways to train one model on two processes: this project's, and what a user would take instead.

All of them have the same model, microbatches, loss and AdamW, and run the same steps when they are told to. Each says
for its process when the part of a run that counts began and ended.
"""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from shapes import Shape, random_rows
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lopt_pp.data import DataOrder, Microbatch
from lopt_pp.distributed import World, boundaries
from lopt_pp.end_to_end import EndToEndPipeline, clip_grad_norm
from lopt_pp.metrics import COMPUTE_PHASES
from lopt_pp.objectives import NextToken
from lopt_pp.optim import OptimConfig, Optimizer
from lopt_pp.split import BlockModel, Span, block_class, split_at
from lopt_pp.stage import Stage, local_objective
from lopt_pp.stream import Receiver, Sender, StreamReceiver, StreamSender
from lopt_pp.topology import Topology
from lopt_pp.trainer import Record, stream_headers, train
from lopt_pp.verify import check_split

PROCESSES = 2
QUEUE_DEPTH = 2
TIMEOUT = 600.0
OPTIM = OptimConfig(learning_rate=1e-6, lr_scheduler_type="constant")
MANY_STEPS = 10**9
"""The length of the run for schedules of learning rates; the one here is constant."""

Cut = tuple[int, ...]
"""The layers that the blocks after the first begin with."""


@dataclass(frozen=True)
class Trial:
    """What one process has seen of a run.

    Attributes:
        begin: when the part that counts began, in seconds of the machine's monotonic clock.
        end: when it was over.
        microbatch: seconds that the process's stage computed for a microbatch; 0 where that is not measured.
        optimizer: seconds of its optimizer step; likewise.
    """

    begin: float
    end: float
    microbatch: float = 0.0
    optimizer: float = 0.0


class Bench:
    """One process's copy of a model, which all peers train.

    They share the weights and AdamW's moments, since what is measured is time: so all of them fit into memory, and none
    has memory that another has not touched.

    Args:
        world: this process.
        group: all processes, on the payload's backend.
        shape: of the model and its microbatches.
        dtype: of the computation.
    """

    def __init__(self, world: World, group: dist.ProcessGroup, shape: Shape, dtype: torch.dtype) -> None:
        self.world, self.group, self.shape, self.dtype = world, group, shape, dtype
        self.rank, self.device = world.rank, world.device
        self.config = LlamaConfig(**{**shape.config, "tie_word_embeddings": False})
        depth = self.config.num_hidden_layers
        self.anatomy = check_split(LlamaForCausalLM, self.config, split_at([depth // 2], depth))
        with torch.device("meta"):
            parameters = dict(LlamaForCausalLM(self.config).named_parameters())
        draw = torch.Generator().manual_seed(0)
        self._weights = {
            name: (torch.ones(tensor.shape) if "norm" in name else 0.02 * torch.randn(tensor.shape, generator=draw)).to(
                self.device
            )
            for name, tensor in parameters.items()
        }
        self._moments: dict[str, dict] = {name: {} for name in self._weights}

    def blocks(self, cut: Cut, own: Sequence[int]) -> list[BlockModel]:
        """The blocks of the model, cut before the layers `cut`, whose numbers are in `own`."""
        spans = split_at(cut, self.config.num_hidden_layers)
        return [self._block(spans[number]) for number in own]

    def _block(self, span: Span) -> BlockModel:
        own = {name: tensor for name, tensor in self._weights.items() if self.anatomy.owns(span, name)}
        block = block_class(LlamaForCausalLM, self.anatomy, span)
        model = block.from_pretrained(None, config=self.config, state_dict=own, dtype=torch.float32).to(self.device)
        # Parameters of its own, so that hooks and gradients stay apart, on the tensors that all share.
        model.load_state_dict(own, assign=True)
        return BlockModel(model.train(), self.anatomy, span)

    def share_moments(self, optimizer: Optimizer, blocks: Sequence[BlockModel]) -> None:
        """Lets an optimizer over the parameters of `blocks` (and others) go on from the moments that all share."""
        state: defaultdict[torch.Tensor, dict] = defaultdict(dict)
        for block in blocks:
            for name, parameter in block.model.named_parameters():
                state[parameter] = self._moments[name]
        optimizer.adamw.state = state

    def optimizer(self, blocks: Sequence[BlockModel]) -> Optimizer:
        """Of an end-to-end peer; a stage of this project has its own."""
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        optimizer = Optimizer(parameters, OPTIM, OPTIM.learning_rate, MANY_STEPS)
        self.share_moments(optimizer, blocks)
        return optimizer

    def stage(self, cut: Cut) -> Stage:
        """This process's stage of the pipeline by local learning."""
        (block,) = self.blocks(cut, [self.rank])
        objective = local_objective(block, weight=10.0, seed=0)
        stage = Stage(block, objective, OPTIM, MANY_STEPS, dtype=self.dtype, device=self.device)
        self.share_moments(stage.optimizer, [block])
        return stage

    def order(self, microbatches: int, steps: int, more: int = 0) -> DataOrder:
        """Of `steps` steps of so many microbatches each, and then of `more` microbatches."""
        rows = self.shape.rows * (microbatches * steps + more)
        return DataOrder(
            random_rows(self.config.vocab_size, self.shape.tokens, rows),
            per_device_train_batch_size=self.shape.rows,
            gradient_accumulation_steps=microbatches,
            shuffle=True,
            seed=0,
            pad_token_id=0,
        )

    def now(self) -> float:
        """The machine's monotonic clock, when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class Peer(Protocol):
    """A way to train.

    Attributes:
        num_blocks: that the model is cut into.
        label: in tables.
    """

    num_blocks: ClassVar[int]
    label: ClassVar[str]

    def __init__(self, bench: Bench, cut: Cut) -> None: ...

    def run(self, microbatches: int, steps: int) -> Trial:
        """Trains for `steps` steps of so many microbatches. All processes call it at the same time."""


class LocalLearning:
    """This project: the real stage, stream and loop.

    The part that counts begins when the last stage is given its first hidden states, and ends when it is given those
    that follow the last step that counts: a pipeline fills once in a run and not in every step. Two more microbatches
    come after, so that both stages work to the end of it.
    """

    num_blocks = 2
    label = "LoPT-PP"

    def __init__(self, bench: Bench, cut: Cut) -> None:
        self._bench = bench
        self._stage = bench.stage(cut)

    def run(self, microbatches: int, steps: int) -> Trial:
        stage, order = self._stage, self._bench.order(microbatches, steps, more=2)
        num_steps = order.steps_per_epoch
        receivers: dict[int, Receiver] = {}
        senders: dict[int, Sender] = {}
        ends = boundaries(self._bench.world, Topology(PROCESSES, PROCESSES), TIMEOUT)
        headers = stream_headers(order, num_steps, stage)
        dist.barrier()
        begin = self._bench.now()
        if self._bench.rank == 0:
            senders[0] = StreamSender(ends[0], headers, QUEUE_DEPTH)
        else:
            receiver = StreamReceiver(ends[0], headers, QUEUE_DEPTH)
            receivers[1] = noting = _Noting(receiver, self._bench, (0, microbatches * steps))
        train([stage], receivers, senders, order, num_steps, lambda record: None)
        dist.barrier()
        for group in {ends[0].headers, ends[0].payload}:
            dist.destroy_process_group(group)
        return Trial(begin, begin) if self._bench.rank == 0 else Trial(*noting.times)


class _Noting:
    """A receiver that notes when the messages with the numbers `wanted` were given to the stage."""

    def __init__(self, receiver: Receiver, bench: Bench, wanted: Sequence[int]) -> None:
        self._receiver = receiver
        self._bench = bench
        self._wanted = wanted
        self._received = 0
        self.times: list[float] = []

    def receive(self) -> torch.Tensor:
        hidden_states = self._receiver.receive()
        if self._received in self._wanted:
            self.times.append(self._bench.now())
        self._received += 1
        return hidden_states

    def close(self) -> None:
        self._receiver.close()


class Computing:
    """The same stages without the stream: each trains on hidden states that are there already.

    Both processes work at the same time, as in the pipeline, since cores that share caches and memory slow each other;
    with `in_turn` one after the other.
    """

    num_blocks = 2
    label = "computing"

    def __init__(self, bench: Bench, cut: Cut, in_turn: bool = False) -> None:
        self._bench = bench
        self._in_turn = in_turn
        self._stage = bench.stage(cut)

    def run(self, microbatches: int, steps: int) -> Trial:
        if not self._in_turn:
            return self._train(microbatches, steps, more=2)
        for rank in range(PROCESSES):
            dist.barrier()
            if rank == self._bench.rank:
                trial = self._train(microbatches, steps, more=0)
        dist.barrier()
        return trial

    def _train(self, microbatches: int, steps: int, more: int) -> Trial:
        bench, stage, records = self._bench, self._stage, list[Record]()
        order = bench.order(microbatches, steps, more)
        shape = bench.shape.rows, bench.shape.tokens, bench.config.hidden_size
        hidden_states = torch.randn(shape).to(bench.device, bench.dtype)
        receivers: dict[int, Receiver] = {1: _Endless(hidden_states)} if bench.rank == 1 else {}
        senders: dict[int, Sender] = {0: _Dropping()} if bench.rank == 0 else {}
        begin = bench.now()
        train([stage], receivers, senders, order, order.steps_per_epoch, records.append)
        records = records[:steps]
        optimizer = sum(record["optimizer_seconds"] for record in records)
        computing = sum(record[f"{phase}_seconds"] for record in records for phase in COMPUTE_PHASES)
        microbatch = (computing - optimizer) / (microbatches * steps)
        return Trial(begin, bench.now(), microbatch, optimizer / steps)


class _Endless:
    """Gives the same hidden states again and again."""

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self._hidden_states = hidden_states

    def receive(self) -> torch.Tensor:
        return self._hidden_states

    def close(self) -> None:
        pass


class _Dropping:
    """Takes hidden states to nowhere."""

    def send(self, hidden_states: torch.Tensor) -> None:
        pass

    def close(self) -> None:
        pass


class _EndToEnd:
    """A peer whose step ends in all processes together: what counts is the whole of a run.

    Args:
        bench: the model.
        cut: where the blocks begin.
        own: the numbers of this process's blocks.
        clip_group: over which the gradient's norm is summed; None where every process has the whole gradient.
    """

    def __init__(self, bench: Bench, cut: Cut, own: Sequence[int], clip_group: dist.ProcessGroup | None) -> None:
        self.bench = bench
        self.blocks = bench.blocks(cut, own)
        self._clip_group = clip_group
        self._optimizer = bench.optimizer(self.blocks)

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        """Runs the microbatches of a step forward and backward; the loss, where this process knows it."""
        raise NotImplementedError

    def run(self, microbatches: int, steps: int) -> Trial:
        order = self.bench.order(microbatches, steps)
        dist.barrier()
        begin = self.bench.now()
        for step in range(steps):
            batches = order.microbatches(step)
            loss = self.backward(batches, sum(batch.num_targets for batch in batches))
            clip_grad_norm(self._optimizer.parameters, OPTIM.max_grad_norm, self._clip_group)
            self._optimizer.step()
            if loss is not None:
                loss.item()  # A training logs it.
        return Trial(begin, self.bench.now())


class _TorchPipeline(_EndToEnd):
    """A schedule of `torch.distributed.pipelining`."""

    schedule: ClassVar[str]
    num_blocks: ClassVar[int] = 2

    def __init__(self, bench: Bench, cut: Cut) -> None:
        super().__init__(bench, cut, self.own(bench.rank), bench.group)
        self._pipeline = EndToEndPipeline(
            self.blocks, bench.group, bench.device, dtype=bench.dtype, schedule=self.schedule
        )

    def own(self, rank: int) -> list[int]:
        """The numbers of the blocks that process `rank` holds."""
        return [rank]

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        return self._pipeline.step(batches, num_targets)


class GPipe(_TorchPipeline):
    label = "GPipe"
    schedule = "GPipe"


class OneForwardOneBackward(_TorchPipeline):
    """With one microbatch per step, which torch's class refuses, 1F1B's order of work is GPipe's, and that one runs."""

    label = "1F1B"
    schedule = "1F1B"


class ZeroBubble(_TorchPipeline):
    label = "zero-bubble"
    schedule = "InterleavedZeroBubble"
    num_blocks = 2 * PROCESSES

    def own(self, rank: int) -> list[int]:
        return [rank, rank + PROCESSES]


class ZeroBubbleV(_TorchPipeline):
    label = "ZB-V"
    schedule = "ZBVZeroBubble"
    num_blocks = 2 * PROCESSES

    def own(self, rank: int) -> list[int]:
        return [rank, self.num_blocks - 1 - rank]


class _Block(nn.Module):
    """A block with the task loss on its end, if it is the last, for loops written here."""

    def __init__(self, block: BlockModel, dtype: torch.dtype) -> None:
        super().__init__()
        self.block = block
        self._dtype = dtype
        self._objective = NextToken()

    def forward(self, batch: Microbatch, hidden_states: torch.Tensor | None, num_targets: int) -> torch.Tensor:
        with torch.autocast(batch.input_ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            if hidden_states is None:
                output = self.block(input_ids=batch.input_ids, logits_to_keep=batch.target_positions)
            else:
                output = self.block(hidden_states=hidden_states.float(), logits_to_keep=batch.target_positions)
            if self.block.span.is_last:
                return self._objective(output, batch) / num_targets
            return output.hidden_states.to(self._dtype).contiguous()


class Naive(_EndToEnd):
    """Both halves in turn, as `device_map` runs them: while one computes, the other waits."""

    num_blocks = 2
    label = "naive"

    def __init__(self, bench: Bench, cut: Cut) -> None:
        super().__init__(bench, cut, [bench.rank], bench.group)
        self._block = _Block(self.blocks[0], bench.dtype)

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        bench, losses = self.bench, []
        for batch in (batch.to(bench.device) for batch in batches):
            shape = (*batch.input_ids.shape, bench.config.hidden_size)
            received = torch.empty(shape, dtype=bench.dtype, device=bench.device)
            if bench.rank == 0:
                output = self._block(batch, None, num_targets)
                dist.send(output.detach(), 1, bench.group)
                dist.recv(received, 1, bench.group)
                output.backward(received)
            else:
                dist.recv(received, 0, bench.group)
                loss = self._block(batch, received.requires_grad_(), num_targets)
                loss.backward()
                assert received.grad is not None
                dist.send(received.grad, 0, bench.group)
                losses.append(loss.detach())
        return torch.stack(losses).sum() if losses else None


class DataParallel(_EndToEnd):
    """The whole model in each process, half the microbatches each; of a single microbatch half the rows each."""

    num_blocks = 1
    label = "DDP"

    def __init__(self, bench: Bench, cut: Cut) -> None:
        super().__init__(bench, cut, [0], None)
        whole = _Block(self.blocks[0], bench.dtype)
        self._replica = DistributedDataParallel(whole, process_group=bench.group, gradient_as_bucket_view=True)

    def backward(self, batches: Sequence[Microbatch], num_targets: int) -> torch.Tensor | None:
        rank, device = self.bench.rank, self.bench.device
        own = [_half_the_rows(batches[0], rank)] if len(batches) == 1 else list(batches[rank::PROCESSES])
        losses = []
        for batch in own[:-1]:
            with self._replica.no_sync():
                losses.append(self._one(batch.to(device), num_targets))
        losses.append(self._one(own[-1].to(device), num_targets))
        return torch.stack(losses).sum()

    def _one(self, batch: Microbatch, num_targets: int) -> torch.Tensor:
        # DDP takes the mean over the processes, of what is a sum here.
        loss = self._replica(batch, None, num_targets) * PROCESSES
        loss.backward()
        return loss.detach()


def _half_the_rows(batch: Microbatch, rank: int) -> Microbatch:
    own = slice(rank, None, PROCESSES)
    return dataclasses.replace(
        batch, input_ids=batch.input_ids[own], labels=batch.labels[own], token_mask=batch.token_mask[own]
    )


PEERS: dict[str, type[Peer]] = {
    "lopt": LocalLearning,
    "1f1b": OneForwardOneBackward,
    "gpipe": GPipe,
    "zero_bubble": ZeroBubble,
    "zbv": ZeroBubbleV,
    "naive": Naive,
    "ddp": DataParallel,
}
