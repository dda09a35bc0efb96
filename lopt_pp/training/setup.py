"""What a run is made of: the model, its cuts and its rows, all of it read and proved before anything is written."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lopt_pp.checkpoint.best import Criterion
from lopt_pp.checkpoint.compatibility import OPTIMIZER_STATE, in_words, may_change, must_match, shared_by_ranks
from lopt_pp.checkpoint.output_dir import DESCRIPTION
from lopt_pp.checkpoint.resume import Wanted
from lopt_pp.config.topology import Topology
from lopt_pp.config.train_config import Config
from lopt_pp.data import MicrobatchSampler, RowLimits, Rows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.data.splits import load_split
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError
from lopt_pp.model.balancing import check_routers
from lopt_pp.model.block import BlockModel
from lopt_pp.model.build import BlockBuilder, Keep
from lopt_pp.model.dtypes import AUTO, dtype_of
from lopt_pp.model.partition import BlockSpec, split_at, split_evenly
from lopt_pp.model.pretrained import aligned_configs, description, write_description
from lopt_pp.model.special_tokens import pad_token_id
from lopt_pp.model.stored import warn_of_unused
from lopt_pp.model.verify import check_sample, check_split
from lopt_pp.model.verify_packing import check_packing
from lopt_pp.model.verify_positions import row_limits
from lopt_pp.model.weights import PretrainedWeights
from lopt_pp.objectives import local_objective_class, task_objective_class
from lopt_pp.planning.auto_split import find_cuts
from lopt_pp.stage.optimizer import check_optimizer
from lopt_pp.training.given import NOTHING, Given, find_pretrained, find_tokenizer
from lopt_pp.training.token_metrics import TokenMetrics, find_criterion, find_metrics

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """The model, its cuts and the rows of a run: proved to go together, and the same in all processes.

    Attributes:
        config: the flags.
        topology: of the run.
        model_class: of the pretrained model.
        model_config: of the pretrained model.
        builder: of the model's blocks.
        weights: of the pretrained model, not read yet.
        specs: the layers of each stage.
        tokenizer: of the model.
        rows: to train on.
        held_out: to evaluate on; None where a run is not evaluated.
        criterion: what its models are compared by; None where there is nothing to compare.
        metrics: what evaluations measure of single tokens; None for nothing.
        num_steps: of the run.
        day: of its start, which its rows have where the chat template prints a date.
        pad_token_id: that rows are padded with.
        generation: settings of a model that a script has loaded; None where they are read from its files.
        own_optimizer: the name of a script's own; None for that which flags name.
    """

    config: Config
    topology: Topology
    model_class: type[PreTrainedModel]
    model_config: PreTrainedConfig
    builder: BlockBuilder
    weights: PretrainedWeights
    specs: tuple[BlockSpec, ...]
    tokenizer: PreTrainedTokenizerBase
    rows: Rows
    held_out: EvaluationSets | None
    criterion: Criterion | None
    metrics: TokenMetrics | None
    num_steps: int
    day: date
    pad_token_id: int
    generation: GenerationConfig | None = None
    own_optimizer: str | None = None

    def sampler(self, replica: int) -> MicrobatchSampler:
        """The microbatches of a replica."""
        return _sampler(self.config, self.rows, self.pad_token_id, replica, self.topology.num_replicas)

    def load(self, spec: BlockSpec, device: torch.device = _CPU, keep: Keep | None = None) -> BlockModel:
        """The block at a place of the model, with its pretrained weights; as `BlockBuilder.from_pretrained` has it."""
        return self.builder.from_pretrained(spec, self.weights, device, keep)

    def load_copy(self, spec: BlockSpec, device: torch.device = _CPU, keep: Keep | None = None) -> BlockModel:
        """A copy of parts of other blocks, for an objective; the arguments are those of `load`.

        Raises:
            LoptError: they do not run by themselves.
        """
        check_sample(self.model_class, self.model_config, self.builder.structure, spec)
        return self.load(spec, device, keep)

    @property
    def is_end_to_end(self) -> bool:
        """Whether several processes train the model end to end. (One process does so as a single stage.)"""
        return self.config.objective.method == "e2e" and self.topology.num_processes > 1

    @property
    def loss_names(self) -> list[str | None]:
        """Of each stage; None where it has no loss."""
        local = local_objective_class(self.config.objective)
        earlier = None if local is None else local.name
        task = task_objective_class(self.config.objective)
        return [earlier] * (self.topology.num_stages - 1) + [task.name]

    def must_match(self) -> dict[str, object]:
        """What the run must have in common with one whose checkpoint it goes on from, by name."""
        tied = self.builder.ties_embeddings
        matching = must_match(self.config, self.model_config, self.rows, self.topology.num_replicas, tied)
        return matching | ({OPTIMIZER_STATE: self.own_optimizer} if self.own_optimizer else {})

    def may_change(self) -> dict[str, object]:
        """What changes the result of the run, and may differ from the one whose checkpoint it goes on from, by name."""
        return may_change(self.config, self.num_steps, self.held_out)

    def wanted(self) -> Wanted:
        """The run, for whoever looks for a checkpoint that it can go on from."""
        return Wanted(
            which=self.config.checkpoint.resume_from_checkpoint,
            output_dir=Path(self.config.run.output_dir),
            overwrites=self.config.run.overwrite_output_dir,
            num_steps=self.num_steps,
            must_match=self.must_match(),
            may_change=self.may_change(),
            digest_without=self.rows.digest_without,
            source=self.rows.source,
        )

    def log(self) -> None:
        """Says what is trained, on which rows."""
        if self.config.pipeline.sharding == "full" and self.topology.num_replicas == 1:
            logger.warning("--sharding full is of no effect: there is one replica, so nothing is shared out")
        logger.info("%s", self.rows.summary())
        if self.held_out is not None:
            logger.info("evaluated on %s", self.held_out.summary())
        cut = "; ".join(map(str, self.specs))
        logger.info("%s, cut into %s; %d steps", self.model_class.__name__, cut, self.num_steps)
        if self.model_config.tie_word_embeddings and not self.builder.ties_embeddings:
            logger.info(
                "the input and output embeddings, which the pretrained model ties, are two tensors: each learns by "
                "itself, and the result has both"
            )
        *_, changes = aligned_configs(self.config.model, self.model_config, self.tokenizer, self.generation)
        if self.tokenizer.pad_token_id not in (None, self.pad_token_id):
            logger.warning(
                "the tokenizer's padding token %s has the id %d, which the model has no embedding for: rows are padded "
                "with the id %d instead; whoever pads for the result must do so, too",
                self.tokenizer.pad_token,
                self.tokenizer.pad_token_id,
                self.pad_token_id,
            )
        if changes:
            logger.info("the result has its tokenizer's ids of special tokens: %s", "; ".join(changes))

    @property
    def given_dtype(self) -> torch.dtype | None:
        """Of the saved weights, by the user; None for the pretrained model's own."""
        given = self.config.checkpoint.save_dtype
        return None if given == AUTO else dtype_of(given)

    def _saved_dtype(self) -> torch.dtype:
        """What the result's config says: where its tensors have several, the dtype of most numbers of the first stage.

        (Of the first stage, since no process opens the files of all others.)
        """
        if self.given_dtype is not None:
            return self.given_dtype
        trained = self.config.stage.parameter_dtype
        dtype = self.builder.stored_dtype(self.specs[0], self.weights)
        return trained if dtype is None or dtype.itemsize > trained.itemsize else dtype

    @cached_property
    def description(self) -> Mapping[str, bytes]:
        """All files of the trained model but its weights, made where they are first asked for: before the first step.

        Raises:
            LoptError: one of them cannot be saved.
        """
        scratch = Path(self.config.run.output_dir) / DESCRIPTION
        return description(
            scratch,
            self.config.model,
            self.model_config,
            self.tokenizer,
            self.model_class,
            self._saved_dtype(),
            self.builder.ties_embeddings,
            self.generation,
        )

    def write_description(self, directory: Path) -> None:
        """Writes all of the trained model but its weights: config, generation settings, tokenizer."""
        write_description(directory, self.description)


def prepare(config: Config, world: World, day: date, given: Given = NOTHING) -> Setup:
    """Reads what a run is made of, but for the weights. All processes must call this.

    Args:
        config: the flags.
        world: this process.
        day: of the run's start, the same in all processes.
        given: objects of a script, in place of what flags would name.

    Raises:
        LoptError: something in the flags, the model or the data is unusable, or not the same in all processes.
    """
    check_optimizer(config.optim)
    # The model: its class and its cuts, and the proof that it splits there.
    topology = config.topology(world.size)
    world.say("reading the model %s, and whether it splits exactly", config.model.model_name_or_path)
    tokenizer = find_tokenizer(config.model, config.data, given.tokenizer)
    pretrained = find_pretrained(config.model, given.model, tokenizer, config.run.seed, warns=world.rank == 0)
    model_class, model_config, weights = pretrained.model_class, pretrained.config, pretrained.weights
    depth = model_config.num_hidden_layers
    cuts = config.pipeline.boundaries if topology.num_stages > 1 else None
    specs = split_at(cuts, depth) if cuts is not None else split_evenly(depth, topology.num_stages)
    structure = check_split(model_class, model_config, specs)
    check_routers(model_class, model_config, config.objective.router_aux_loss_coef)
    builder = BlockBuilder(model_class, model_config, structure, added=pretrained.added)
    unused = builder.unused_tensors(weights)
    if world.rank == 0:
        warn_of_unused(unused, weights.name_or_path)
    # Where one stage trains all of the model, no two stages own its embeddings.
    if config.objective.method == "e2e" and topology.num_processes == 1 and config.objective.train_embeddings:
        builder = replace(builder, ties_embeddings=builder.stores_tied_embeddings(weights))
    if config.data.packs_rows:
        check_packing(model_class, model_config, specs, structure)
    # The rows. One process of each node tokenizes; the others read what it has cached.
    limits = RowLimits(*row_limits(builder.whole, config.data.max_length))
    world.say("reading the rows")
    with world.one_process_first("rows"):
        rows, held_out = load_split(config.evaluation, config.data, tokenizer, config.run.seed, limits, day, given.rows)
    metrics = find_metrics(config.evaluation, held_out, given.compute_metrics)
    criterion = find_criterion(config, held_out, metrics)
    pad = pad_token_id(tokenizer, limits.num_embeddings)
    sampler = _sampler(config, rows, pad, topology.replica_of(world.rank), topology.num_replicas)
    num_steps = config.run.num_steps(sampler.steps_per_epoch)
    for name, window in config.report.windows.items():
        if window[0] > num_steps:
            raise LoptError(f"--{name} {window[0]}-{window[-1]}: the run has {num_steps} steps")
    # Whoever has other flags, rows or versions is found here, before it could train something else.
    world.check_consistent(shared_by_ranks(config, model_config, rows, held_out), in_words)
    if config.pipeline.split == "auto" and topology.num_stages > 1:
        # By timings, which differ.
        found = world.from_rank_0("cuts", lambda: find_cuts(config, topology, builder, sampler, world.device))
        specs = split_at(found, depth)
        check_split(model_class, model_config, specs)
    return Setup(
        config=config,
        topology=topology,
        model_class=model_class,
        model_config=model_config,
        builder=builder,
        weights=weights,
        specs=specs,
        tokenizer=tokenizer,
        rows=rows,
        held_out=held_out,
        criterion=criterion,
        metrics=metrics,
        num_steps=num_steps,
        day=day,
        pad_token_id=pad,
        generation=pretrained.generation,
        own_optimizer=None if given.optimizer is None else given.optimizer.name,
    )


def _sampler(config: Config, rows: Rows, pad_token_id: int, replica: int, num_replicas: int) -> MicrobatchSampler:
    return MicrobatchSampler(
        rows,
        per_device_train_batch_size=config.run.per_device_train_batch_size,
        gradient_accumulation_steps=config.run.gradient_accumulation_steps,
        shuffle=config.data.shuffle_dataset,
        seed=config.run.seed if config.run.data_seed is None else config.run.data_seed,
        pad_token_id=pad_token_id,
        replica=replica,
        num_replicas=num_replicas,
        sampling=config.data.train_sampling_strategy,
        drop_last=config.run.dataloader_drop_last,
        keep_apart=config.data.packs_rows,
        # Flash attention keeps rows apart only where all of them are in one sequence.
        padding_free=config.data.padding_free
        or (config.data.packs_rows and "flash" in (config.model.attn_implementation or "")),
    )
