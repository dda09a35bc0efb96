"""Where the trained model is published, if it is."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lopt_pp.config.fields import Resume, check_types, flag
from lopt_pp.errors import LoptError


def _flag(help: str, is_secret: bool = False) -> dict[str, Any]:
    """Metadata of a flag that says where a model goes, and changes nothing of it. Rank 0 alone reads it."""
    return flag(help, on_resume=Resume.NO_EFFECT, shared_by_ranks=False, compared=False, is_secret=is_secret)


@dataclass(frozen=True)
class HubConfig:
    """Whether and how the model goes to the Hugging Face Hub."""

    _argument_group_name: ClassVar[str] = "Hugging Face Hub"

    push_to_hub: bool = field(
        default=False,
        metadata=_flag(
            "Push the trained model to the Hugging Face Hub; --hub_strategy says when. You must be logged in "
            "(`hf auth login`, or the environment variable HF_TOKEN). `lopt-pp push` does it later."
        ),
    )
    hub_model_id: str | None = field(
        default=None,
        metadata=_flag(
            "Name of the model's repository, such as `organization/name`; without an organization it is yours. By "
            "default the name of --output_dir. It is made if it is not there."
        ),
    )
    hub_strategy: Literal["end", "every_save", "checkpoint", "all_checkpoints"] = field(
        default="every_save",
        metadata=_flag(
            "What is pushed: `end`, the model at the end of the run; `every_save`, the model of each checkpoint as "
            "well, in the background; `checkpoint`, and the newest checkpoint as `last-checkpoint`, for a run that "
            "goes on elsewhere; `all_checkpoints`, and each checkpoint under its own name."
        ),
    )
    hub_private_repo: bool | None = field(
        default=None,
        metadata=_flag("Whether a repository that is made is private; by default as its owner has set it on the hub."),
    )
    hub_token: str | None = field(
        default=None,
        metadata=_flag(
            "Token with the right to write, where it is not that of `hf auth login` or HF_TOKEN. A command line is "
            "seen by other users of the machine, so prefer these. It is written nowhere.",
            is_secret=True,
        ),
    )
    hub_always_push: bool = field(
        default=False,
        metadata=_flag(
            "Push every checkpoint, one after another. By default one is left out that is saved while the one before "
            "it is still being pushed."
        ),
    )
    hub_revision: str | None = field(
        default=None,
        metadata=_flag("Branch to push to, which is made if it is not there; by default `main`."),
    )
    license: str | None = field(
        default=None,
        metadata=_flag(
            "License that the model card names, by the hub's identifier, such as `apache-2.0`. By default that of the "
            "pretrained model's card, where it has one."
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.hub_model_id is not None and self.hub_model_id.count("/") > 1:
            raise LoptError(f"--hub_model_id {self.hub_model_id}: give NAME or ORGANIZATION/NAME")
