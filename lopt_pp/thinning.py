"""`lopt-pp auxiliary MODEL --train_file FILE --auxiliary_layers N`: finds the layers of an auxiliary network.

The layers after the cut are left out one by one, each time the one without which the loss on rows of the task is
lowest, until N are left. A network of layers at even distances no longer does what the model did, and while it learns
that again it pushes its block about; one that is thinned with care starts near the model's own loss. Leaving out layers
of a pretrained model by what the loss says is known from depth pruning (Shortened LLaMA, arXiv 2402.02834, ranks them
once; here each is tried again after every removal).
"""

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lopt_pp.data import DataConfig, Microbatch, TokenizedRows, load_rows
from lopt_pp.errors import LoptError, renamed_in_errors
from lopt_pp.evaluate import load_blocks, means_over_targets, single_rows
from lopt_pp.generate import add_common, be_quiet, dtype_of
from lopt_pp.guard import complain
from lopt_pp.model import ModelConfig, load_model_config, load_tokenizer
from lopt_pp.objectives import NextToken
from lopt_pp.split import BlockModel


@dataclass(frozen=True)
class Thinned:
    """A model with some of its layers left out.

    Attributes:
        layers: after the cut, that are left.
        loss: mean cross-entropy on the rows, in nats.
    """

    layers: tuple[int, ...]
    loss: float


def thin(
    front: BlockModel, rest: BlockModel, number: int, rows: TokenizedRows, device: torch.device
) -> Iterator[Thinned]:
    """Leaves out one layer after another, each time the one that is missed least; the whole model comes first.

    Of layers that are missed alike the earliest goes. The model is whole again afterwards.

    Args:
        front: the model's block before the cut, on `device`.
        rest: its block after the cut, likewise.
        number: of layers after the cut that stay.
        rows: that the loss is measured on.
        device: to measure on.
    """
    objective = NextToken()
    # The front is the same for all, and runs once.
    with torch.no_grad():
        entering = [front(input_ids=batch.input_ids).hidden_states for batch in single_rows(rows, device)]

    def loss(what: str) -> float:
        def of_row(batch: Microbatch) -> tuple[torch.Tensor]:
            wanted = {"logits_to_keep": batch.target_positions, "leave_logits": True}
            return (objective(rest(hidden_states=entering[batch.step], **wanted), batch),)

        (score,) = means_over_targets(of_row, rows, device, what)
        return score.value

    with _left_out(rest) as left_out:
        kept = list(rest.span.layers)
        yield Thinned(tuple(kept), loss("the whole model"))
        while len(kept) > number:
            losses = {}
            for layer in kept:
                left_out.add(layer)
                losses[layer] = loss(f"{len(kept)} layers without {layer}")
                left_out.remove(layer)
            least = min(kept, key=losses.__getitem__)
            kept.remove(least)
            left_out.add(least)
            yield Thinned(tuple(kept), losses[least])


@contextlib.contextmanager
def _left_out(block: BlockModel) -> Iterator[set[int]]:
    """Gives the set of layers that hidden states pass by; empty at first."""
    numbers: set[int] = set()

    def passing(number: int, run: Callable[..., Any]) -> Callable[..., Any]:
        gives_tensor = False

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal gives_tensor
            entered = args[0] if args else kwargs["hidden_states"]
            if number in numbers and gives_tensor:
                return entered
            output = run(*args, **kwargs)
            gives_tensor = isinstance(output, torch.Tensor)
            if number not in numbers:
                return output
            return entered if gives_tensor else (entered, *output[1:])

        return forward

    for number, layer in zip(block.span.layers, block.layers, strict=True):
        layer.forward = passing(number, layer.forward)
    try:
        yield numbers
    finally:
        for layer in block.layers:
            del layer.forward


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        "lopt-pp auxiliary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="directory or hub id of the pretrained model")
    parser.add_argument("--train_file", metavar="FILE", required=True, help="rows of the task, as for lopt-pp train")
    parser.add_argument("--auxiliary_layers", type=int, required=True, metavar="N", help="layers to be left")
    parser.add_argument("--split", default="midpoint", help="midpoint, or the first layer after the cut")
    parser.add_argument(
        "--limit", type=int, default=16, help="rows to measure on, from all over the file (default: 16)"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="longest row in tokens (default: 1024)")
    add_common(parser)
    given = parser.parse_args(arguments)
    if given.limit < 1:
        parser.error("--limit: at least 1")
    if given.split != "midpoint" and not given.split.isdecimal():
        parser.error(f"--split {given.split}: midpoint, or one layer number")
    be_quiet()
    try:
        _choose(given)
    except LoptError as error:
        complain(str(error))
        return 1
    return 0


def _choose(given: argparse.Namespace) -> None:
    with renamed_in_errors("--model_name_or_path ", ""):
        config = ModelConfig(given.model, trust_remote_code=given.trust_remote_code)
        depth = load_model_config(config).num_hidden_layers
        tokenizer = load_tokenizer(config)
    cut = depth // 2 if given.split == "midpoint" else int(given.split)
    if not 0 < cut < depth:
        raise LoptError(f"--split {cut}: the model has {depth} layers; give 1 to {depth - 1}")
    if not 1 <= given.auxiliary_layers <= depth - cut:
        raise LoptError(f"--auxiliary_layers {given.auxiliary_layers}: {depth - cut} follow the cut; give 1 to as many")
    rows = load_rows(DataConfig(train_file=[given.train_file], max_length=given.max_length), tokenizer)
    assert isinstance(rows, TokenizedRows)
    if len(rows) > given.limit:
        rows = rows.select(np.linspace(0, len(rows) - 1, given.limit).astype(int), "beyond --limit")
    with renamed_in_errors("--model_name_or_path ", ""):
        front, rest = (
            block.to(given.device, dtype_of(given.dtype, given.device)) for block in load_blocks(config, [cut])
        )
    print(f"{'layers':>6}  {'loss':>7}  left out", flush=True)
    layers: tuple[int, ...] = tuple(range(cut, depth))
    for step in thin(front, rest, given.auxiliary_layers, rows, given.device):
        gone = "".join(str(layer) for layer in layers if layer not in step.layers)
        layers = step.layers
        print(f"{len(layers):>6}  {step.loss:>7.3f}  {gone}".rstrip(), flush=True)
    print(f"--auxiliary_choice {','.join(map(str, layers))}")


if __name__ == "__main__":
    sys.exit(main())
