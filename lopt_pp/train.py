"""`torchrun --nproc-per-node 2 -m lopt_pp.train FLAGS`: a training run from its flags to the saved model."""

import copy
import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from torch.distributed import Store
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from lopt_pp.balance import find_cuts
from lopt_pp.card import model_card
from lopt_pp.checkpoint import (
    Committer,
    PartWriter,
    remove_unfinished_checkpoints,
)
from lopt_pp.config import Config, parse_config
from lopt_pp.data import DataOrder, Rows, load_rows, with_chat_template
from lopt_pp.distributed import Failure, World, boundaries, check_shared, connect, mesh_of_processes, rank_and_size
from lopt_pp.end_to_end_stage import EndToEndStage
from lopt_pp.errors import LoptError
from lopt_pp.guard import Guard, complain
from lopt_pp.metrics import Record
from lopt_pp.model import load_model_config, load_tokenizer
from lopt_pp.objectives import NextToken, Reconstruction
from lopt_pp.replicas import Replicas
from lopt_pp.reporting import Collector, post
from lopt_pp.resume import resume
from lopt_pp.saving import check_output_dir, finish_model, keep_shards, remove_unfinished, save_stage
from lopt_pp.split import BlockModel, Span, split_at, split_evenly
from lopt_pp.stage import NotFiniteError, Stage, local_objective
from lopt_pp.stream import LocalStream, Receiver, Sender, StreamReceiver, StreamSender
from lopt_pp.trainer import stream_headers, train
from lopt_pp.verify import check_split, model_class_of
from lopt_pp.verify_packing import check_packing
from lopt_pp.weights import Checkpoint, load_block

logger = logging.getLogger(__name__)


class Run:
    """One process's part of a training run.

    Args:
        config: the flags.
        world: this process.

    Raises:
        LoptError: something in the flags, the model or the data is unusable; nothing has been written then.
    """

    def __init__(self, config: Config, world: World) -> None:
        self.config, self.world = config, world
        self.output_dir = Path(config.run.output_dir)
        check_output_dir(self.output_dir, config.run.overwrite_output_dir)
        self.topology = config.topology(world.size)
        self.replica = self.topology.replica_of(world.rank)
        self.own_stages = self.topology.stages_of(world.rank)
        self.name = self.topology.name_of(world.rank)
        _set_up_logging(self.name, config.run.logging_steps, world.rank)

        self.model_config = load_model_config(config.model)
        model_class = model_class_of(self.model_config, config.model.trust_remote_code)
        depth = self.model_config.num_hidden_layers
        cuts = config.pipeline.boundaries if self.topology.num_stages > 1 else None
        spans = split_at(cuts, depth) if cuts is not None else split_evenly(depth, self.topology.num_stages)
        checkpoint = Checkpoint(config.model.model_name_or_path, config.model.model_revision)
        anatomy = check_split(model_class, self.model_config, spans)
        if config.data.packs_rows:
            check_packing(model_class, self.model_config, spans, anatomy)
        self.tokenizer = with_chat_template(load_tokenizer(config.model), config.data)
        with world.one_process_first("rows"):
            self.rows = load_rows(config.data, self.tokenizer)
        self.order = _data_order(config, self.rows, self.tokenizer, self.replica, self.topology.num_replicas)
        self.num_steps = _num_steps(config, self.order)
        world.agree(self._facts())
        if config.pipeline.split == "auto" and self.topology.num_stages > 1:
            if world.rank == 0:  # It tells the others: timings differ.
                found = find_cuts(
                    config, self.topology, model_class, self.model_config, anatomy, self.order, world.device
                )
                world.store.set("cuts", json.dumps(found))
            spans = split_at(json.loads(world.store.get("cuts")), depth)
            check_split(model_class, self.model_config, spans)
        self.spans = spans
        if world.rank == 0:
            remove_unfinished(self.output_dir)
            logger.info("%s", self.rows.summary())
            logger.info("%s, cut into %s; %d steps", model_class.__name__, "; ".join(map(str, spans)), self.num_steps)
        self._make_stages(lambda span: load_block(checkpoint, model_class, self.model_config, anatomy, span))
        if 0 < config.checkpoint.save_steps < self.num_steps or config.checkpoint.resume_from_checkpoint == "latest":
            why = "checkpoints need an --output_dir that all machines share, or --save_steps 0"
            check_shared(world, self.output_dir, why)
        self.steps_done = resume(
            world,
            config.checkpoint.resume_from_checkpoint,
            self.output_dir,
            self._trained,
            spans,
            self.num_steps,
            self._essentials(),
            self._settings,
            checks_parts=self.replica == 0,
        )

    def _make_stages(self, load: Callable[[Span], BlockModel]) -> None:
        """Makes what this process trains: its stages, or its part of an end-to-end pipeline."""
        config, world = self.config, self.world
        self.stages: list[Stage] = []
        self.end_to_end: EndToEndStage | None = None
        is_end_to_end = config.objective.method == "e2e" and self.topology.num_processes > 1
        replicas = None
        if is_end_to_end or self.topology.num_replicas > 1:
            mesh = mesh_of_processes(world, self.topology)
        if self.topology.num_replicas > 1:
            replicas = Replicas(mesh["replica"], sharded=config.pipeline.sharding == "full")
        for index in self.own_stages:
            block = load(self.spans[index])
            if is_end_to_end:
                self.end_to_end = EndToEndStage(
                    block,
                    config.optim,
                    self.num_steps,
                    mesh["pipeline"].get_group(),
                    config=config.stage,
                    seed=config.run.seed,
                    device=world.device,
                    replicas=replicas,
                )
                continue
            self.stages.append(
                Stage(
                    block,
                    local_objective(block, config.objective, config.run.seed),
                    config.optim,
                    self.num_steps,
                    config=config.stage,
                    seed=config.run.seed,
                    device=world.device,
                    replicas=replicas,
                )
            )

    @property
    def _trained(self) -> Sequence[Stage | EndToEndStage]:
        """What this process trains."""
        return [self.end_to_end] if self.end_to_end is not None else self.stages

    @property
    def _settings(self) -> dict[str, object]:
        """What changes the result of a run, and may change on the way."""
        return {"the number of steps": self.num_steps, **self.config.settings()}

    def _essentials(self) -> dict[str, object]:
        """What a run must have in common with the one whose checkpoint it goes on from."""
        run = self.config.run
        rows = run.per_device_train_batch_size * run.gradient_accumulation_steps * self.topology.num_replicas
        groups = self.config.data.train_sampling_strategy == "group_by_length"
        return {
            "the model's config": self.model_config.to_json_string(use_diff=False),
            "the training rows (sha256)": self.rows.digest,
            "the rows of a step": rows,
            "the rows that are grouped by length": run.per_device_train_batch_size if groups else 0,
            **self.config.data.essentials(),
            "--seed": run.seed,
            "--method": self.config.objective.method,
            "the dtype of the weights": str(self.config.stage.parameter_dtype),
        }

    def _checkpoints(self) -> tuple[PartWriter, Committer | None]:
        """Writes this process's parts, and on rank 0 makes checkpoints of all."""
        config, store = self.config.checkpoint, self.world.connection(timedelta(days=3650))
        writer = PartWriter(self.output_dir, store, self.topology.num_stages, is_writer=self.replica == 0)
        if self.world.rank != 0:
            return writer, None
        remove_unfinished_checkpoints(self.output_dir)
        due = [step for step in range(self.steps_done + 1, self.num_steps) if config.saves_after(step)]
        run = self._essentials() | self._settings
        committer = Committer(
            self.output_dir,
            self.world.connection(timedelta(days=3650)),
            due,
            self.spans,
            run,
            self._describe,
            config.save_total_limit,
        )
        return writer, committer

    def _facts(self) -> dict[str, object]:
        """What all processes must have in common for the result to mean anything."""
        flags = self.config.flags()
        for local in ("model_name_or_path", "train_file", "output_dir", "overwrite_output_dir", "logging_steps"):
            flags.pop(local)  # Paths may differ between machines; what they hold is compared below.
        return {
            **{f"--{name}": value for name, value in flags.items()},
            "the training rows (sha256)": self.rows.digest,
            "the model's config": self.model_config.to_json_string(use_diff=False),
            "the version of torch": torch.__version__,
            "the version of transformers": transformers.__version__,
        }

    def train(self) -> None:
        """Trains the stages of this process, and leaves the model in the output directory.

        Raises:
            NotFiniteError: a loss or a gradient is not finite; the stages have the weights from before that step.
            StreamError: a neighbour is gone, or disagrees.
        """
        collector = self._collector() if self.world.rank == 0 else None
        report = functools.partial(post, self.world.store, self.replica)
        writer, committer = self._checkpoints()

        def after_step(steps_done: int) -> None:
            if steps_done < self.num_steps and self.config.checkpoint.saves_after(steps_done):
                writer.save(self._trained, steps_done)

        try:
            if self.end_to_end is not None:
                self.end_to_end.train(self.order, self._steps, report, after_step)
            else:
                self._train_stages(report, after_step)
            writer.finish()
        except NotFiniteError as error:
            if self.keeps_last_good:
                error = NotFiniteError(f"{error}. The weights from before that step are kept in {self._last_good}")
            raise error
        self._save(self.output_dir, self.world.store)
        if committer is not None:
            committer.join()
        if collector is not None:
            collector.join()
            if self.config.data.streaming:  # Only now it is known.
                logger.info("%s", self.rows.summary())
            _say_how_it_went(collector, self.output_dir)

    @property
    def _steps(self) -> range:
        """The steps that are to be made."""
        return range(self.steps_done, self.num_steps)

    def _train_stages(self, report: Callable[[Record], None], after_step: Callable[[int], None]) -> None:
        """Joins the stages of this process to their neighbours, and trains them."""
        pipeline = self.config.pipeline
        ends = boundaries(self.world, self.topology, pipeline.stream_timeout)
        receivers: dict[int, Receiver] = {}
        senders: dict[int, Sender] = {}
        for stage in self.stages:
            headers = stream_headers(self.order, self._steps, stage)
            if stage.index - 1 in ends:
                receivers[stage.index] = StreamReceiver(ends[stage.index - 1], headers, pipeline.queue_depth)
            if stage.index in ends:
                headers = stream_headers(self.order, self._steps, stage)
                senders[stage.index] = StreamSender(ends[stage.index], headers, pipeline.queue_depth)
            elif stage.index + 1 in self.own_stages:
                senders[stage.index] = receivers[stage.index + 1] = LocalStream()
        train(self.stages, receivers, senders, self.order, self._steps, report, after_step)

    def _collector(self) -> Collector:
        earlier = Reconstruction.name if self.config.objective.method == "lopt" else None
        return Collector(
            self.world.connection(timedelta(days=3650)),
            self.output_dir / "metrics.jsonl",
            [earlier] * (self.topology.num_stages - 1) + [NextToken.name],
            self.num_steps,
            self.config.run.logging_steps,
            self.topology.num_replicas,
            self.steps_done,
        )

    @property
    def keeps_last_good(self) -> bool:
        """Whether the weights are saved where a loss is not finite.

        Replicas that hold a share each would have to stop at the same step to give what they have.
        """
        return not any(stage.is_sharded for stage in self._trained)

    @property
    def _last_good(self) -> Path:
        return self.output_dir / "last_good"

    def abandon(self, failure: Failure) -> None:
        """Saves what the stages have, where a loss somewhere was not finite, as an ordinary model to look into.

        Leaves nothing half-written. May be called from any thread.
        """
        if failure.keep:
            try:
                self._save(self._last_good, self.world.connection(timedelta(minutes=2)))
            except (RuntimeError, OSError, LoptError) as error:
                complain(f"{self.name}: the last good weights could not be saved: {error}")
        remove_unfinished(self.output_dir)

    def _save(self, path: Path, store: Store) -> None:
        for stage in self._trained:
            save_stage(stage, path, store, is_writer=self.replica == 0)
        if self.world.rank != 0:
            keep_shards(self._trained if self.replica == 0 else [], path, store)
            return
        finish_model(
            path,
            store,
            self.topology.num_stages,
            self._describe,
            lambda steps: model_card(self.config, self.rows, steps, self.num_steps),
        )

    def _describe(self, directory: Path) -> None:
        """Writes all of a model but its weights: config, generation settings, tokenizer."""
        config = copy.deepcopy(self.model_config)
        config.tie_word_embeddings = False
        config.dtype = self.config.stage.parameter_dtype
        config.save_pretrained(directory)
        _generation_config(self.config, config).save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)


def _data_order(
    config: Config, rows: Rows, tokenizer: PreTrainedTokenizerBase, replica: int, num_replicas: int
) -> DataOrder:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return DataOrder(
        rows,
        per_device_train_batch_size=config.run.per_device_train_batch_size,
        gradient_accumulation_steps=config.run.gradient_accumulation_steps,
        shuffle=config.data.shuffle_dataset,
        seed=config.run.seed,
        pad_token_id=pad if pad is not None else 0,
        replica=replica,
        num_replicas=num_replicas,
        sampling=config.data.train_sampling_strategy,
        keep_apart=config.data.packs_rows,
        # Flash attention keeps rows apart only where all of them stand in one.
        padding_free=config.data.padding_free
        or (config.data.packing and "flash" in (config.model.attn_implementation or "")),
    )


def _num_steps(config: Config, order: DataOrder) -> int:
    run = config.run
    return run.max_steps if run.max_steps > 0 else math.ceil(run.num_train_epochs * order.steps_per_epoch)


def _generation_config(config: Config, model_config: PreTrainedConfig) -> GenerationConfig:
    """The pretrained model's generation settings, or what its config implies where it has none."""
    try:
        return GenerationConfig.from_pretrained(config.model.model_name_or_path, revision=config.model.model_revision)
    except OSError:
        return GenerationConfig.from_model_config(model_config)


def _set_up_logging(name: str, logging_steps: int, rank: int) -> None:
    """Log lines on standard error that say which stage speaks."""
    logging.basicConfig(format=f"[{name}] %(message)s", level=logging.INFO, force=True)
    for library in ("transformers", "datasets", "httpx", "huggingface_hub", "torch.distributed"):
        logging.getLogger(library).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _say_how_it_went(collector: Collector, output_dir: Path) -> None:
    minutes, seconds = divmod(round(collector.seconds), 60)
    logger.info("the model is in %s, after %d min %02d s of training", output_dir, minutes, seconds)
    for stage, shares in enumerate(collector.summary()):
        logger.info("stage %d: %s", stage, ", ".join(f"{share:.1%} {what}" for what, share in shares.items()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a training from the command line; returns the exit status: 0 done, 1 failed, 2 unusable flags."""
    try:
        config = parse_config(sys.argv[1:] if arguments is None else arguments)
        topology = config.topology(rank_and_size()[1])
        with connect(config.pipeline) as world, Guard(world, topology) as guard:
            try:
                run = Run(config, world)
                guard.abandon = run.abandon
                run.train()
            except LoptError as error:
                guard.fail(str(error), keep=isinstance(error, NotFiniteError) and run.keeps_last_good)
                return 1
    except LoptError as error:  # All processes have the same flags, and the same to say of them.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            complain(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
