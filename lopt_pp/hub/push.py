"""Pushes a model, or what a checkpoint holds, to the hub: after a run, or in place of it."""

from pathlib import Path

from lopt_pp.checkpoint.export import ordinary_model
from lopt_pp.checkpoint.model_card import plain_card
from lopt_pp.checkpoint.output_dir import complete_checkpoints, is_checkpoint
from lopt_pp.config.hub import HubConfig
from lopt_pp.errors import LoptError
from lopt_pp.hub.published import model_files
from lopt_pp.hub.pusher import folder_of, step_of
from lopt_pp.hub.repository import find_repository

MESSAGE = "Upload model"
"""Of a commit."""


def push(directory: Path, config: HubConfig, message: str = MESSAGE, trust_remote_code: bool = False) -> str:
    """Pushes a model to the hub; the repository is made where it is not there.

    Args:
        directory: the output directory of a finished run or another model's, or a checkpoint, whose model is made for
            it.
        config: where it goes. With the strategies `checkpoint` and `all_checkpoints` the checkpoint, or the newest one
            of an output directory, goes there as well; `all_checkpoints` means all of them there.
        message: of the commit.
        trust_remote_code: whether code that comes with the model may run, where its model is made of a checkpoint.

    Returns:
        The page of the model.

    Raises:
        LoptError: there is no model, the user is not logged in or may not write there, or the push has failed.
    """
    if not directory.is_dir():
        raise LoptError(f"{directory}: no such directory")
    own = is_checkpoint(directory)
    if not own:
        model_files(directory)
    repository = find_repository(config, directory.parent if own else directory)
    repository.open()
    checkpoints = [directory] if own else complete_checkpoints(directory)
    if config.hub_strategy != "all_checkpoints":
        checkpoints = checkpoints[:1]
    for checkpoint in reversed(checkpoints):
        folder = folder_of(checkpoint, config.hub_strategy)
        if folder is not None:
            repository.push_checkpoint(checkpoint, folder, f"{message}, checkpoint after step {step_of(checkpoint)}")
    with ordinary_model(str(directory), trust_remote_code) as path:
        card = Path(path) / "README.md"
        if own and not card.exists():
            card.write_text(plain_card(repository.name), encoding="utf-8")
        return repository.push_model(Path(path), message)
