"""`lopt-pp auxiliary MODEL --train_file FILE --auxiliary_layers N`: finds the layers of an auxiliary network.

The layers after the cut are left out one by one, each time the one without which the loss on rows of the task is
lowest, until N are left. A network of layers at even distances no longer does what the model did, and while it learns
that again it pushes its block about; one whose layers are pruned with care starts near the model's own loss. Leaving
out layers of a pretrained model by what the loss says is known from depth pruning (Shortened LLaMA, arXiv 2402.02834,
ranks them once; here each is tried again after every removal).
"""

import argparse
from collections.abc import Sequence
from os.path import expanduser

from lopt_pp.commands.common import CommandParser, add_common, be_quiet, device_and_dtype, say
from lopt_pp.errors import LoptError, renamed_in_errors


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = CommandParser(
        "lopt-pp auxiliary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=expanduser, metavar="MODEL", help="directory or hub id of the pretrained model")
    parser.add_argument(
        "--train_file", type=expanduser, metavar="FILE", required=True, help="rows of the task, as for lopt-pp train"
    )
    parser.add_argument("--auxiliary_layers", type=int, required=True, metavar="N", help="layers to be left")
    parser.add_argument("--split", default="midpoint", help="midpoint, or the first layer after the cut")
    parser.add_argument(
        "--limit", type=int, default=16, help="rows to measure on, from all over the file (default: 16)"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="longest row in tokens (default: 1024)")
    add_common(parser)
    given = parser.read(arguments)
    if given.limit < 1:
        parser.error("--limit: at least 1")
    if given.split != "midpoint" and not given.split.isdecimal():
        parser.error(f"--split {given.split}: midpoint, or one layer number")
    _run(given)
    return 0


def _run(given: argparse.Namespace) -> None:
    say()
    import numpy as np
    import torch

    from lopt_pp.config.data import DataConfig
    from lopt_pp.config.model import ModelConfig
    from lopt_pp.data import RowLimits, TokenizedRows, load_rows
    from lopt_pp.evaluation.layer_pruning import prune_layers
    from lopt_pp.evaluation.losses import load_blocks
    from lopt_pp.model.dtypes import cast_parameters
    from lopt_pp.model.pretrained import load_model_config, load_tokenizer, model_class_of
    from lopt_pp.model.verify_positions import row_limits
    from lopt_pp.objectives import ObjectiveConfig, task_objective

    be_quiet()
    with renamed_in_errors("--model_name_or_path ", ""):
        config = ModelConfig(given.model, trust_remote_code=given.trust_remote_code)
        said = load_model_config(config)
        depth = said.num_hidden_layers
        tokenizer = load_tokenizer(config)
        with torch.device("meta"):
            whole = model_class_of(said, given.trust_remote_code)(said)
    cut = depth // 2 if given.split == "midpoint" else int(given.split)
    if not 0 < cut < depth:
        raise LoptError(f"--split {cut}: the model has {depth} layers; give 1 to {depth - 1}")
    if not 1 <= given.auxiliary_layers <= depth - cut:
        raise LoptError(f"--auxiliary_layers {given.auxiliary_layers}: {depth - cut} follow the cut; give 1 to as many")
    limits = RowLimits(*row_limits(whole, given.max_length))
    rows = load_rows(DataConfig(train_file=[given.train_file], max_length=given.max_length), tokenizer, limits)
    assert isinstance(rows, TokenizedRows)
    if len(rows) > given.limit:
        rows = rows.select(np.linspace(0, len(rows) - 1, given.limit).astype(int), "beyond --limit")
    device, dtype = device_and_dtype(given)
    with renamed_in_errors("--model_name_or_path ", ""):
        front, rest = load_blocks(config, [cut])
    for block in (front, rest):
        cast_parameters(block, device, dtype)
    print(f"{'layers':>6}  {'loss':>7}  left out", flush=True)
    layers: tuple[int, ...] = tuple(range(cut, depth))
    task = task_objective(ObjectiveConfig())
    for step in prune_layers(front, rest, given.auxiliary_layers, task, rows, device):
        gone = "".join(str(layer) for layer in layers if layer not in step.layers)
        layers = step.layers
        print(f"{len(layers):>6}  {step.loss:>7.3f}  {gone}".rstrip(), flush=True)
    print(f"--auxiliary_choice {','.join(map(str, layers))}")
