"""What a model of `transformers` runs: the operators, seen one by one."""

from collections.abc import Mapping, Sequence
from typing import Any

from lopt_pp.util import compat_torch

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
"""The config of a model that is as small as can be, as far as families share it."""


class Seen(compat_torch.DispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Sequence[Any], Mapping[str, Any]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((function, args, kwargs or {}))
        return function(*args, **kwargs or {})

    @property
    def packets(self) -> set[Any]:
        return {function.overloadpacket for function, *_ in self.calls}
