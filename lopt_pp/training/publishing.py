"""The model card of a run, and its pushes to the hub."""

import json
from collections.abc import Sequence
from pathlib import Path

from lopt_pp.checkpoint.best import Measured
from lopt_pp.checkpoint.model_card import Effort, Trained, model_card
from lopt_pp.checkpoint.output_dir import RUN_FILE, ModelOrigin
from lopt_pp.config.train_config import Config
from lopt_pp.distributed.shutdown import RunLength
from lopt_pp.hub.pusher import Pusher
from lopt_pp.hub.repository import Repository, find_repository
from lopt_pp.training.setup import Setup

_FLAG = "--push_to_hub"


def repository_of(config: Config) -> Repository | None:
    """Where the run's model goes on the hub; None where it goes nowhere. For rank 0, first of all.

    Raises:
        LoptError: the user cannot push there; see `find_repository`.
    """
    return find_repository(config.hub, Path(config.run.output_dir), _FLAG) if config.hub.push_to_hub else None


def card(
    setup: Setup,
    steps_done: Sequence[int],
    measured: Measured | None = None,
    repository: Repository | None = None,
    effort: Effort | None = None,
    origin: ModelOrigin | None = None,
) -> str:
    """The model card of a run.

    Args:
        setup: of the run.
        steps_done: of each stage.
        measured: which model this is, and its loss on the held-out rows; None where it was not measured.
        repository: where it goes; None where it goes nowhere.
        effort: what the training took, if it is known.
        origin: how many steps the run has made, where it may have finished early.
    """
    trained = Trained(
        setup.config,
        setup.rows,
        setup.num_steps,
        setup.held_out,
        setup.builder.ties_embeddings,
        bool(setup.tokenizer.chat_template),
        None if repository is None else repository.name,
    )
    return model_card(trained, steps_done, measured, effort, origin)


def effort_of(output_dir: Path, last_stage: int) -> Effort | None:
    """What a run took, by the files that it has left so far; None where they do not say it.

    Args:
        output_dir: of the run.
        last_stage: whose records are counted; all stages train on the same tokens.
    """
    mark, num_tokens, seconds = f'"stage": {last_stage},', 0, 0.0
    try:
        with (output_dir / "metrics.jsonl").open(encoding="utf-8") as lines:
            for record in (json.loads(line) for line in lines if mark in line):
                num_tokens, seconds = num_tokens + record["num_tokens"], seconds + record["step_seconds"]
        processes = json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))["processes"]
        return Effort(num_tokens, seconds, [process["device"] for process in processes])
    except (OSError, ValueError, KeyError, TypeError):  # On a full disk some of it is not there.
        return None


def open_pusher(setup: Setup, repository: Repository | None, length: RunLength) -> Pusher | None:
    """What pushes the run's model, and its checkpoints' models meanwhile; None where nothing is pushed. For rank 0.

    Raises:
        LoptError: the repository cannot be made, or may not be written.
    """
    if repository is None:
        return None
    repository.open(_FLAG)
    config, num_stages = setup.config, setup.topology.num_stages
    return Pusher(
        repository,
        Path(config.run.output_dir),
        config.hub.hub_strategy,
        config.hub.hub_always_push,
        length,
        lambda step: card(setup, [step] * num_stages, repository=repository),
        ("--trust_remote_code",) if config.model.trust_remote_code else (),
    )
