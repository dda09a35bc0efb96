"""What all methods of the pipeline benchmark have in common: the model, the data, AdamW, and what a trial is."""

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.helpers.synthetic import MANY_STEPS, OPTIM, Format, random_rows
from lopt_pp.config.compute import StageConfig
from lopt_pp.data import MicrobatchSampler
from lopt_pp.distributed.world import World
from lopt_pp.model.block import BlockModel
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.partition import BlockSpec, split_at
from lopt_pp.model.verify import check_split
from lopt_pp.objectives import ObjectiveConfig, local_objective
from lopt_pp.stage.optimizer import Optimizer
from lopt_pp.stage.stage import Stage

PROCESSES = 2

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


class SharedModel:
    """One process's copy of a model, which all methods train.

    They share the weights and AdamW's moments, since what is measured is time: so all of them fit into memory, and none
    has memory that another has not touched.

    Args:
        world: this process.
        group: all processes, on the payload's backend.
        shape: of the model and its microbatches.
        dtype: of the computation.
    """

    def __init__(self, world: World, group: dist.ProcessGroup, shape: Format, dtype: torch.dtype) -> None:
        self.world, self.group, self.shape, self.dtype = world, group, shape, dtype
        self.rank, self.device = world.rank, world.device
        self.config = LlamaConfig(**{**shape.config, "tie_word_embeddings": False})
        depth = self.config.num_hidden_layers
        self.structure = check_split(LlamaForCausalLM, self.config, split_at([depth // 2], depth))
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
        specs = split_at(cut, self.config.num_hidden_layers)
        return [self._block(specs[number]) for number in own]

    def _block(self, spec: BlockSpec) -> BlockModel:
        own = self._weights_of(spec)
        block = self._copy(spec).to(self.device)
        # Parameters of its own, so that hooks and gradients stay apart, on the tensors that all share.
        block.model.load_state_dict(own, assign=True)
        return block.train()

    def _copy(self, spec: BlockSpec) -> BlockModel:
        """A block, or the layers of an auxiliary network, with weights of its own."""
        builder = BlockBuilder(LlamaForCausalLM, self.config, self.structure)
        return builder.from_state_dict(spec, self._weights_of(spec), "the benchmark's weights")

    def _weights_of(self, spec: BlockSpec) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self._weights.items() if self.structure.owns(spec, name)}

    def share_moments(self, optimizer: Optimizer, blocks: Sequence[BlockModel]) -> None:
        """Lets an optimizer over the parameters of `blocks` (and others) go on from the moments that all share."""
        state: defaultdict[torch.Tensor, dict] = defaultdict(dict)
        for block in blocks:
            for name, parameter in block.model.named_parameters():
                state[parameter] = self._moments[name]
        optimizer.inner.state = state

    @property
    def config_of_stages(self) -> StageConfig:
        return StageConfig(dtype="bfloat16" if self.dtype == torch.bfloat16 else "float32")

    def optimizer(self, blocks: Sequence[BlockModel]) -> Optimizer:
        """Of an end-to-end method; a stage of this project has its own."""
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        optimizer = Optimizer(parameters, OPTIM, OPTIM.learning_rate, MANY_STEPS)
        self.share_moments(optimizer, blocks)
        return optimizer

    def stage(self, cut: Cut, objective: ObjectiveConfig) -> Stage:
        """This process's stage of the pipeline by local learning, or one that only runs forward."""
        (block,) = self.blocks(cut, [self.rank])
        stage = Stage(
            block,
            local_objective(block, objective, seed=0, load=self._copy),
            OPTIM,
            MANY_STEPS,
            config=self.config_of_stages,
            local_accumulation_steps=objective.local_accumulation_steps,
            device=self.device,
        )
        if stage.optimizer is not None:
            self.share_moments(stage.optimizer, [block])
        return stage

    def sampler(self, microbatches: int, steps: int, more: int = 0) -> MicrobatchSampler:
        """Of `steps` steps of so many microbatches each, and then of `more` microbatches."""
        rows = self.shape.rows * (microbatches * steps + more)
        return MicrobatchSampler(
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


class Method(Protocol):
    """A way to train.

    Attributes:
        num_blocks: that the model is cut into.
        label: in tables.
    """

    num_blocks: ClassVar[int]
    label: ClassVar[str]

    def __init__(self, shared: SharedModel, cut: Cut) -> None: ...

    def run(self, microbatches: int, steps: int) -> Trial:
        """Trains for `steps` steps of so many microbatches. All processes call it at the same time."""
