"""What the head of a model card says, which the Hugging Face Hub reads: of public names only.

Whatever is a path of this machine is left out. `huggingface_hub` writes the head, as the hub expects it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from lopt_pp.config.data import DataConfig
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.presets import PRESETS
from lopt_pp.evaluation.scores import perplexity
from lopt_pp.util.compat_transformers import find_file

_IN_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/")
"""Of the path of a model in the hub's cache."""


def hub_id(name: str) -> str | None:
    """The name, if it is one of the hub's and not of a directory here, nor that of a class (of a model in memory)."""
    if Path(name).exists() or name.count("/") > 1 or name.startswith((".", "~")):
        return None
    if "/" not in name and name != name.lower():  # Models without an owner, such as `gpt2`, have names like this.
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def card_of(config: ModelConfig) -> dict[str, Any]:
    """The head of the pretrained model's own card; empty where it has none, or the hub does not give it."""
    try:
        path = find_file(config.model_name_or_path, "README.md", config.model_revision)
        return (metadata_load(path) if path is not None else None) or {}
    except Exception:  # A card is whatever somebody wrote, and nothing depends on it.
        return {}


def base_model(config: ModelConfig, card: dict[str, Any]) -> str | None:
    """The hub's name of the pretrained model; None where it is known under a path alone.

    A directory may be the hub's cache, or say in its card what it was made of.

    Args:
        config: names the pretrained model.
        card: of `card_of`.
    """
    name = config.model_name_or_path
    if (found := hub_id(name)) is not None:
        return found
    if (cached := _IN_CACHE.search(f"{Path(name).resolve()}/")) is not None:
        return f"{cached[1]}/{cached[2]}"
    said = card.get("base_model")
    if isinstance(said, list) and len(said) == 1:
        (said,) = said
    return hub_id(said) if isinstance(said, str) and "/" in said else None


@dataclass(frozen=True)
class License:
    """What a card says of the license; see the hub's documentation of model cards.

    Attributes:
        license: its identifier, `other` for those that have none.
        license_name: of another one.
        license_link: to the text of another one.
    """

    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


NO_LICENSE = License()


def license_of(given: str | None, card: dict[str, Any]) -> License:
    """That of the flag, or of the pretrained model's card; empty where neither has one."""
    if given is not None:
        return License(given)
    names = (field.name for field in fields(License))
    return License(**{name: card[name] for name in names if isinstance(card.get(name), str)})


def datasets(config: DataConfig) -> list[str]:
    """The names on the hub of what was trained on."""
    return list(dict.fromkeys(name for name in _trained_on(config) if name is not None))


def has_local_rows(config: DataConfig) -> bool:
    """Whether some of what was trained on has no name on the hub."""
    return None in _trained_on(config)


def _trained_on(config: DataConfig) -> list[str | None]:
    """What was trained on, by its name on the hub; None for what has none."""
    preset = PRESETS.get(config.dataset_mapping or "")
    if config.datasets:
        return [None if entry.local_files else hub_id(entry.path) for entry in config.mixture]
    if config.dataset_name is not None:
        return [hub_id(config.dataset_name)]
    return [preset.name if preset is not None and not config.train_file else None]


@dataclass(frozen=True)
class HeldOut:
    """A loss on held-out rows of a data set of the hub.

    Attributes:
        dataset: its name.
        config: of it; None where it has one.
        split: that the rows are of.
        loss: mean cross-entropy of their target tokens, in nats.
    """

    dataset: str
    config: str | None
    split: str
    loss: float

    def results(self) -> list[EvalResult]:
        """For the `model-index` of a card."""
        return [
            EvalResult(
                task_type="text-generation",
                dataset_type=self.dataset,
                dataset_name=self.dataset,
                dataset_config=self.config,
                dataset_split=self.split,
                metric_type=name,
                metric_value=round(value, 6),
                metric_name=f"Held-out {name}",
            )
            for name, value in (("loss", self.loss), ("perplexity", perplexity(self.loss)))
        ]


def head(
    name: str,
    tags: Sequence[str],
    base: str | None = None,
    trained_on: Sequence[str] = (),
    license: License = NO_LICENSE,
    held_out: HeldOut | None = None,
) -> str:
    """The head of a card: YAML between lines of dashes.

    Args:
        name: of the model, for its results.
        tags: of it.
        base: of `base_model`.
        trained_on: of `datasets`.
        license: of `license_of`.
        held_out: what was measured, if it can be named.
    """
    data = ModelCardData(
        base_model=base,
        datasets=list(trained_on) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(tags),
        model_name=name if held_out is not None else None,
        eval_results=held_out.results() if held_out is not None else None,
        license=license.license,
        license_name=license.license_name,
        license_link=license.license_link,
    )
    return f"---\n{data.to_yaml()}\n---\n"
