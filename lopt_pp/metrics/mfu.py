"""How much of a device's peak a stage's arithmetic comes to: model FLOPs utilization (MFU).

What counts are the products with weight matrices, for the tokens that the model needs them for: two operations per
weight and token forward, four backward. What does not count: attention's products of activations with each other (which
grow with the length of the rows), norms and activation functions, the embedding's look-up, padding, and what gradient
checkpointing computes again. So it errs on the low side, most with long rows and small models.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from lopt_pp.metrics.records import Record
from lopt_pp.model.block import BlockModel

_PEAKS = {
    # Tera-operations per second without sparsity: bfloat16 with float32 sums, float32 outside the tensor cores.
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 67.0),
    "H200": (989.4, 67.0),
    "H100 NVL": (835.0, 60.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.4, 67.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "RTX A6000": (154.8, 38.7),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
"""By a part of the device's name, the longer ones first where one holds another. Source: NVIDIA's data sheets."""

_OTHERS = {"Laptop", "Ti", "D", "MIG"}
"""Words in the names of devices that are less, or more, than their namesakes."""


def peak_of(device_name: str, dtype: torch.dtype) -> float | None:
    """The peak of a GPU, in operations per second; None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` gives it.
        dtype: of the matrix products.
    """
    words = device_name.replace("-", " ").split()
    if not _OTHERS.isdisjoint(words):
        return None
    for name, (bfloat16, float32) in _PEAKS.items():
        if all(word in words for word in name.split()):
            return 1e12 * (bfloat16 if dtype in (torch.bfloat16, torch.float16) else float32)
    return None


def device_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """The peak of a device, in operations per second; None where it is not known, as of a CPU."""
    if device.type != "cuda":
        return None
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return None  # TF32, with another peak.
    return peak_of(torch.cuda.get_device_name(device), dtype)


@dataclass(frozen=True)
class Work:
    """The arithmetic of a stage.

    Attributes:
        per_token: weights that each real token is multiplied with, forward.
        per_target: those besides that each token with a loss is: the output head's.
        per_learned: those of a local head, that each token is which the stage learns from, forward and backward.
        learned: share of the tokens which it also runs backward.
        peak: operations per second of the device; None where that is not known.
    """

    per_token: float
    per_target: float
    per_learned: float
    learned: float
    peak: float | None

    def flops(self, num_tokens: int, num_targets: int) -> float:
        """The operations of a step."""
        block = (2 + 4 * self.learned) * (self.per_token * num_tokens + self.per_target * num_targets)
        return block + 6 * self.learned * self.per_learned * num_tokens

    def utilization(self, record: Record) -> Record:
        """`mfu`, the share of the peak in a step's wall time, from the step's record; nothing without a peak."""
        if self.peak is None:
            return {}
        flops = self.flops(record["num_tokens"], record["num_targets"])
        return {"mfu": flops / record["step_seconds"] / self.peak}


def work_of(block: BlockModel, objective: nn.Module | None, learned: float, peak: float | None) -> Work:
    """Counts a stage's weights.

    Args:
        block: of the stage.
        objective: with a local head; None where there is none.
        learned: share of its tokens that the stage runs backward.
        peak: of the device.
    """
    config = block.model.config
    per_token = sum(_used(parameter, config) for layer in block.layers for parameter in layer.parameters())
    own = () if objective is None else objective.parameters()
    per_learned = sum(parameter.numel() for parameter in own if parameter.ndim == 2)
    head = block.model.get_output_embeddings() if block.spec.is_last else None
    return Work(per_token, head.weight.numel() if head is not None else 0, per_learned, learned, peak)


def _used(parameter: nn.Parameter, config: PreTrainedConfig) -> float:
    """How many of a parameter's elements a token is multiplied with: of experts (stacked) only the chosen ones' ."""
    if parameter.ndim < 2:
        return 0
    chosen = getattr(config, "num_experts_per_tok", None)
    if parameter.ndim == 3 and chosen is not None:
        return parameter.numel() * min(chosen / parameter.shape[0], 1.0)
    return parameter.numel()
