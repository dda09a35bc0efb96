"""A model's repository on the Hugging Face Hub: found and tried before a run, and pushed to after it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from lopt_pp.config.hub import HubConfig
from lopt_pp.errors import LoptError, first_line
from lopt_pp.hub.published import REPLACED, model_files

logger = logging.getLogger(__name__)

TOKENS_PAGE = "https://huggingface.co/settings/tokens"


class PushError(LoptError):
    """A model, which is where it was, could not be pushed."""


@dataclass(frozen=True)
class Repository:
    """Where a model goes.

    Attributes:
        name: `OWNER/NAME`.
        is_private: whether it is private where it is made; None for what its owner has set on the hub.
        branch: of it; None for the main one.
        token: to write with; None for that of `hf auth login` or HF_TOKEN.
    """

    name: str
    is_private: bool | None = None
    branch: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def flags(self) -> str:
        """Of `lopt-pp push`, that lead here."""
        return f"--hub_model_id {self.name}" + (f" --hub_revision {self.branch}" if self.branch else "")

    def open(self, flag: str = "") -> None:
        """Makes the repository and its branch where they are not there, and sees that the token may write.

        Args:
            flag: that asks for it, for what is said.

        Raises:
            LoptError: it cannot be made, or may not be written.
        """
        api = HfApi(token=self.token)
        with _explained(_said_of(flag) + self.name):
            api.create_repo(self.name, private=self.is_private, exist_ok=True)
            api.auth_check(self.name, write=True)
            if self.is_private and api.model_info(self.name).private is False:
                logger.warning(
                    "%s was there before, and is public: --hub_private_repo changes nothing of it; its settings on "
                    "the hub do",
                    self.name,
                )
            if self.branch is not None:
                api.create_branch(self.name, branch=self.branch, exist_ok=True)

    def push_model(self, directory: Path, message: str) -> str:
        """Pushes a model, in one commit where the hub's library can; of an earlier one's weights nothing is left.

        Args:
            directory: of the model; `lopt_pp.hub.published` says what of it goes.
            message: of the commit.

        Returns:
            The page of the model.

        Raises:
            LoptError: there is no whole model.
            PushError: the hub does not take it.
        """
        names = model_files(directory)
        with _explained(self.name, PushError):
            HfApi(token=self.token).upload_folder(
                repo_id=self.name,
                folder_path=directory,
                commit_message=message,
                revision=self.branch,
                allow_patterns=names,
                delete_patterns=list(REPLACED),
            )
        return f"{constants.ENDPOINT}/{self.name}"

    def push_checkpoint(self, directory: Path, folder: str, message: str) -> None:
        """Pushes a checkpoint into a folder of the repository, in place of what is there.

        Raises:
            PushError: the hub does not take it.
        """
        with _explained(self.name, PushError):
            HfApi(token=self.token).upload_folder(
                repo_id=self.name,
                folder_path=directory,
                path_in_repo=folder,
                commit_message=message,
                revision=self.branch,
                ignore_patterns=["README.md"],
                delete_patterns=["*"],
            )


def find_repository(config: HubConfig, output_dir: Path, flag: str = "") -> Repository:
    """The repository that the flags name, as far as it can be told that the user may write there.

    Nothing is made yet: see `Repository.open`.

    Args:
        config: the flags.
        output_dir: gives it its name where the flags do not.
        flag: that asks for the push, for what is said; empty for a command that does nothing else.

    Raises:
        LoptError: the machine is not to use the hub, nobody is logged in, the token is not accepted or may only read,
            or the hub has no such names.
    """
    said_of = _said_of(flag)
    if is_offline_mode():
        later = f"; or leave {flag} out, and push later: lopt-pp push OUTPUT_DIR --hub_model_id NAME" if flag else ""
        raise LoptError(f"{said_of}HF_HUB_OFFLINE is set, so the hub is not asked: unset it{later}")
    name = config.hub_model_id or output_dir.resolve().name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        given = "" if config.hub_model_id else " (the name of --output_dir); give --hub_model_id"
        raise LoptError(f"--hub_model_id {name}{given}: {first_line(error)}") from error
    token = config.hub_token or get_token()
    if token is None:
        raise LoptError(
            f"{said_of}you are not logged in to the hub: `hf auth login`, or set HF_TOKEN to a token that may write, "
            f"from {TOKENS_PAGE}"
        )
    with _explained(flag):
        user = HfApi(token=config.hub_token).whoami()
    access = user.get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise LoptError(f"{said_of}the token of {user['name']} may only read; make one that may write: {TOKENS_PAGE}")
    owned = name if "/" in name else f"{user['name']}/{name}"
    return Repository(owned, config.hub_private_repo, config.hub_revision, config.hub_token)


def _said_of(what: str) -> str:
    return f"{what}: " if what else ""


@contextmanager
def _explained(what: str, kind: type[LoptError] = LoptError) -> Iterator[None]:
    """Says in one line what the hub has against something; `huggingface_hub` says it in several."""
    try:
        yield
    except LoptError:
        raise
    except Exception as error:  # Besides the hub's own, whatever the library that it talks HTTP by raises.
        raise kind(_said_of(what) + _reason(error)) from error


def _reason(error: BaseException) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the hub is not asked: unset it"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if status == 401:
        return f"the hub does not accept the token (401); log in anew: `hf auth login`, with one from {TOKENS_PAGE}"
    if status == 403:
        return f"the token may not write there (403); take one that may, from {TOKENS_PAGE}, or another --hub_model_id"
    cause = error.__cause__
    if isinstance(error, RuntimeError) and cause is not None:  # `Error while uploading FILE`, and why.
        return f"{first_line(error)} {first_line(cause)}"
    if status is None and not isinstance(error, ValueError | OSError | RuntimeError):
        return f"{constants.ENDPOINT} cannot be reached: {first_line(error)}"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "..."
