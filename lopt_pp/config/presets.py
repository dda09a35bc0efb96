"""The presets of `--dataset_mapping`, and where on the hub their rows are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HubDataset:
    """Where a preset of `--dataset_mapping` is on the Hugging Face Hub; `lopt_pp.data.presets` reads its rows.

    Attributes:
        name: of the repository.
        config: which configuration of it; None where it has one.
    """

    name: str
    config: str | None = None


PRESETS = {
    "metamathqa": HubDataset("meta-math/MetaMathQA"),
    "alpaca": HubDataset("tatsu-lab/alpaca"),
    "tulu3": HubDataset("allenai/tulu-3-sft-mixture"),
    "gsm8k": HubDataset("openai/gsm8k", "main"),
}
"""By their names."""
