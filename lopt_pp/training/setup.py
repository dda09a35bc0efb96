"""What a run is made of, from its flags to stages with weights: all of it is looked at before anything is trained."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lopt_pp.checkpoint.compatibility import facts
from lopt_pp.config.topology import Topology
from lopt_pp.config.train_config import Config
from lopt_pp.data import MicrobatchSampler, Rows, TokenizedRows, with_chat_template
from lopt_pp.data.splits import load_split
from lopt_pp.distributed.world import World, mesh_of_processes
from lopt_pp.model.block import BlockModel
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.model.pretrained import load_model_config, load_tokenizer, model_class_of, write_description
from lopt_pp.model.structure import ModelStructure
from lopt_pp.model.verify import check_sample, check_split
from lopt_pp.model.verify_packing import check_packing
from lopt_pp.model.weights import PretrainedWeights, load_block
from lopt_pp.objectives import local_objective
from lopt_pp.planning.auto_split import find_cuts
from lopt_pp.stage.data_parallel import Replicas
from lopt_pp.stage.end_to_end_stage import EndToEndStage
from lopt_pp.stage.stage import Stage
from lopt_pp.training.held_out import Evaluation


@dataclass(frozen=True)
class Setup:
    """The model, its cuts and the rows of a run: proved to go together, and the same in all processes.

    Attributes:
        config: the flags.
        topology: of the run.
        model_class: of the pretrained model.
        model_config: of the pretrained model.
        structure: of the class.
        weights: of the pretrained model, not read yet.
        specs: the layers of each stage.
        tokenizer: of the model.
        rows: to train on.
        held_out: to evaluate on; None where a run is not evaluated.
        num_steps: of the run.
    """

    config: Config
    topology: Topology
    model_class: type[PreTrainedModel]
    model_config: PreTrainedConfig
    structure: ModelStructure
    weights: PretrainedWeights
    specs: tuple[BlockSpec, ...]
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    held_out: TokenizedRows | None
    num_steps: int

    def sampler(self, replica: int) -> MicrobatchSampler:
        """The microbatches of a replica."""
        return _sampler(self.config, self.rows, self.tokenizer, replica, self.topology.num_replicas)

    def evaluation(self, replica: int) -> Evaluation | None:
        """The held-out rows of a replica, and when they are run."""
        if self.held_out is None:
            return None
        return Evaluation(
            self.held_out,
            eval_steps=self.config.evaluation.eval_steps,
            num_steps=self.num_steps,
            per_device_eval_batch_size=self.config.evaluation.per_device_eval_batch_size,
            pad_token_id=_pad_token_id(self.tokenizer),
            on_start=self.config.evaluation.eval_on_start,
            replica=replica,
            num_replicas=self.topology.num_replicas,
        )

    def load(self, spec: BlockSpec) -> BlockModel:
        """The block at a span, with its pretrained weights."""
        return load_block(self.weights, self.model_class, self.model_config, self.structure, spec)

    def load_copy(self, spec: BlockSpec) -> BlockModel:
        """A copy of parts of other blocks, for an objective.

        Raises:
            LoptError: they do not run by themselves.
        """
        check_sample(self.model_class, self.model_config, self.structure, spec)
        return self.load(spec)

    def describe(self, directory: Path) -> None:
        """Writes all of the trained model but its weights: config, generation settings, tokenizer."""
        dtype = self.config.stage.parameter_dtype
        write_description(directory, self.config.model, self.model_config, self.tokenizer, dtype)


def prepare(config: Config, world: World) -> Setup:
    """Reads what a run is made of, but for the weights. All processes must call this.

    Raises:
        LoptError: something in the flags, the model or the data is unusable, or not the same in all processes.
    """
    topology = config.topology(world.size)
    model_config = load_model_config(config.model)
    model_class = model_class_of(model_config, config.model.trust_remote_code)
    depth = model_config.num_hidden_layers
    cuts = config.pipeline.boundaries if topology.num_stages > 1 else None
    specs = split_at(cuts, depth) if cuts is not None else split_evenly(depth, topology.num_stages)
    weights = PretrainedWeights(config.model.model_name_or_path, config.model.model_revision)
    structure = check_split(model_class, model_config, specs)
    if config.data.packs_rows:
        check_packing(model_class, model_config, specs, structure)
    tokenizer = with_chat_template(load_tokenizer(config.model), config.data)
    with world.one_process_first("rows"):
        rows, held_out = load_split(config.evaluation, config.data, tokenizer, config.run.seed)
    sampler = _sampler(config, rows, tokenizer, topology.replica_of(world.rank), topology.num_replicas)
    run = config.run
    num_steps = run.max_steps if run.max_steps > 0 else math.ceil(run.num_train_epochs * sampler.steps_per_epoch)
    world.check_consistent(facts(config, model_config, rows, held_out))
    if config.pipeline.split == "auto" and topology.num_stages > 1:
        if world.rank == 0:  # It tells the others: timings differ.
            found = find_cuts(config, topology, model_class, model_config, structure, sampler, world.device)
            world.store.set("cuts", json.dumps(found))
        specs = split_at(json.loads(world.store.get("cuts")), depth)
        check_split(model_class, model_config, specs)
    return Setup(
        config, topology, model_class, model_config, structure, weights, specs, tokenizer, rows, held_out, num_steps
    )


def build_stages(setup: Setup, world: World) -> tuple[list[Stage], EndToEndStage | None]:
    """Makes what this process trains: its stages, or its part of an end-to-end pipeline. All must call this."""
    config, topology = setup.config, setup.topology
    is_end_to_end = config.objective.method == "e2e" and topology.num_processes > 1
    replicas = None
    if is_end_to_end or topology.num_replicas > 1:
        mesh = mesh_of_processes(world, topology)
    if topology.num_replicas > 1:
        replicas = Replicas(mesh["replica"], sharded=config.pipeline.sharding == "full")
    stages = []
    for index in topology.stages_of(world.rank):
        block = setup.load(setup.specs[index])
        if not config.objective.train_embeddings:
            block.freeze_embeddings()
        if is_end_to_end:  # One block in each process.
            return [], EndToEndStage(
                block,
                config.optim,
                setup.num_steps,
                mesh["pipeline"].get_group(),
                config=config.stage,
                seed=config.run.seed,
                device=world.device,
                replicas=replicas,
            )
        stage = Stage(
            block,
            local_objective(block, config.objective, config.run.seed, setup.load_copy),
            config.optim,
            setup.num_steps,
            config=config.stage,
            local_head_warmup_steps=config.objective.local_head_warmup_steps,
            local_accumulation_steps=config.objective.local_accumulation_steps,
            seed=config.run.seed,
            device=world.device,
            replicas=replicas,
        )
        stages.append(stage)
    return stages, None


def _sampler(
    config: Config, rows: Rows, tokenizer: PreTrainedTokenizerBase, replica: int, num_replicas: int
) -> MicrobatchSampler:
    return MicrobatchSampler(
        rows,
        per_device_train_batch_size=config.run.per_device_train_batch_size,
        gradient_accumulation_steps=config.run.gradient_accumulation_steps,
        shuffle=config.data.shuffle_dataset,
        seed=config.run.seed,
        pad_token_id=_pad_token_id(tokenizer),
        replica=replica,
        num_replicas=num_replicas,
        sampling=config.data.train_sampling_strategy,
        keep_apart=config.data.packs_rows,
        # Flash attention keeps rows apart only where all of them stand in one.
        padding_free=config.data.padding_free
        or (config.data.packing and "flash" in (config.model.attn_implementation or "")),
    )


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return pad if pad is not None else 0
