"""Asks once whether there is a model of a name, before anything of it is fetched; without PyTorch.

`transformers` asks for one file after another, and of a hub that does not answer tries each for half a minute.
"""

from functools import cache
from pathlib import Path

from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError, first_line
from lopt_pp.model.location import ADAPTER, check_location

_CONFIG = "config.json"


def check_named(config: ModelConfig) -> None:
    """Sees that `--model_name_or_path` leads to a model, in a directory or on the hub.

    Raises:
        LoptError: it does not; the text says where was looked, and what to do.
    """
    try:
        check_location(config.model_name_or_path)
        check_on_hub(config.model_name_or_path, config.model_revision)
    except LoptError as error:
        raise LoptError(f"--model_name_or_path {error}") from error


def check_on_hub(name: str, revision: str = "main") -> None:
    """Sees that a name which is not a path of this machine is a model's on the hub, or in the cache of the hub.

    Where the hub answers, but cannot say so just now, the name passes: whoever fetches the model tries for longer.

    Args:
        name: of the model.
        revision: of it.

    Raises:
        LoptError: it is not, or the hub cannot be reached.
    """
    if not Path(name).exists():
        _ask(name, revision)


@cache
def _ask(name: str, revision: str) -> None:
    # Late: most models are in directories.
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    hub, nowhere = constants.ENDPOINT, f"{name}: there is no such directory"
    try:
        if any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in (_CONFIG, ADAPTER)):
            return
        if is_offline_mode():
            raise LoptError(
                f"{nowhere}, nor a model of this name in the cache of the hub, which is not asked since HF_HUB_OFFLINE "
                f"is set; check the name, or unset HF_HUB_OFFLINE"
            )
        get_hf_file_metadata(hf_hub_url(name, _CONFIG, revision=revision))
    except LoptError:
        raise
    except HFValidationError as error:
        raise LoptError(f"{nowhere}, and the hub has no such names; give a directory, or ORGANIZATION/NAME") from error
    except GatedRepoError as error:
        raise LoptError(
            f"{name}: it is gated: ask for access on {hub}/{name}, and log in (`hf auth login`, or set HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise LoptError(
            f"{nowhere}, and {hub} has no model of this name that you may read; check the name, and for a private "
            f"model log in (`hf auth login`, or set HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise LoptError(f"{name}: {hub} has no revision {revision} of it; check --model_revision") from error
    except (EntryNotFoundError, HfHubHTTPError):
        return
    except Exception as error:  # Whatever the library raises that huggingface_hub talks HTTP by.
        raise LoptError(
            f"{nowhere}, nor a model of this name in the cache of the hub, and {hub} cannot be reached "
            f"({first_line(error)}); check the name and the network, or fetch the model where there is one: hf "
            f"download {name}"
        ) from error
