"""The ordinary model of a checkpoint."""

import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lopt_pp.checkpoint.manifest import Manifest, read_manifest
from lopt_pp.checkpoint.named import check_model_or_checkpoint
from lopt_pp.checkpoint.output_dir import check_output_dir, is_checkpoint
from lopt_pp.checkpoint.parts import OpenParts
from lopt_pp.config.model import ModelConfig
from lopt_pp.errors import LoptError, renamed_in_errors
from lopt_pp.model.build import BlockBuilder
from lopt_pp.model.dtypes import AUTO, as_saved, dtype_of
from lopt_pp.model.pretrained import load_model_config, model_class_of
from lopt_pp.model.verify import check_split
from lopt_pp.model.weights import save_shard, shard_name, write_index
from lopt_pp.util.files import copy_files, missing_directories, new_directory, remove_empty
from lopt_pp.util.user_code import search_current_directory

_PARTS = re.compile(r"stage-.*\.safetensors|manifest\.json")


def export(checkpoint: Path, output: Path, trust_remote_code: bool = False, save_dtype: str = AUTO) -> None:
    """Writes the model that a checkpoint holds, with its config and tokenizer, one stage after another.

    Args:
        checkpoint: a directory `checkpoint-STEP`.
        output: of the model; made, and must hold none yet. It is there as a whole or not at all.
        trust_remote_code: whether code that comes with the model may run.
        save_dtype: of the weights; `auto` for the pretrained model's own.

    Raises:
        LoptError: the checkpoint is not whole, or the output directory cannot be written.
    """
    if not checkpoint.is_dir():
        raise LoptError(f"{checkpoint}: no such directory")
    if not is_checkpoint(checkpoint) and (checkpoint / "config.json").exists():
        raise LoptError(f"{checkpoint} is a model already, which transformers opens as it is")
    manifest = read_manifest(checkpoint)
    missing = missing_directories(output)
    try:
        # An export has neither of these flags.
        with renamed_in_errors("--output_dir ", ""), renamed_in_errors(", or --overwrite_output_dir to replace it", ""):
            check_output_dir(output, overwrite=False)
        _export(manifest, output, trust_remote_code, None if save_dtype == AUTO else dtype_of(save_dtype))
    finally:
        remove_empty(missing)


def _export(manifest: Manifest, output: Path, trust_remote_code: bool, given: torch.dtype | None) -> None:
    checkpoint = manifest.directory
    config = load_model_config(ModelConfig(str(checkpoint), trust_remote_code=trust_remote_code))
    if config.num_hidden_layers != manifest.specs[-1].stop:
        raise LoptError(f"{checkpoint}: config.json has {config.num_hidden_layers} layers, and the manifest others")
    model_class = model_class_of(config, trust_remote_code)
    builder = BlockBuilder(model_class, config, check_split(model_class, config, manifest.specs))
    try:
        with new_directory(output) as unfinished:
            paths = (path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())
            copy_files(checkpoint, unfinished, (name for name in paths if not _PARTS.fullmatch(name)))
            sizes, written = {}, Counter[torch.dtype]()
            for spec in manifest.specs:
                manifest.check_part(spec.stage)
                state: dict[str, torch.Tensor] = {}
                with OpenParts(manifest, [spec.stage], "block.") as part:
                    names = {name.removeprefix("block."): name for name in part}
                    own = manifest.parts[spec.stage].dtypes_of(names)
                    for name, stored in names.items():
                        state |= as_saved({name: part[stored]}, given, own)  # One after another, as rounded ones.
                for tensor in state.values():
                    written[tensor.dtype] += tensor.numel()
                sizes[shard_name(spec)] = save_shard(builder.on_meta(spec).model, spec, state, unfinished)
            write_index(sizes, unfinished)
            _say_dtype(unfinished / "config.json", written.most_common(1)[0][0])
    except OSError as error:
        raise LoptError(f"{output} cannot be written: {error}") from error


def _say_dtype(config: Path, dtype: torch.dtype) -> None:
    """Has a config name the dtype that the weights beside it are written in."""
    content = json.loads(config.read_text(encoding="utf-8"))
    content.pop("torch_dtype", None)  # Its name before transformers 5.
    content["dtype"] = str(dtype).removeprefix("torch.")
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def ordinary_model(name: str, trust_remote_code: bool = False) -> Iterator[str]:
    """A path or hub id for `from_pretrained`: of a checkpoint, the ordinary model is made for as long as this lasts.

    Args:
        name: directory or hub id of a model, or directory of a checkpoint.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        LoptError: the checkpoint is not whole, or the name does not lead to a model.
    """
    if trust_remote_code:
        search_current_directory()  # For whoever is given the path; the model's code may import modules of the user's.
    directory = Path(name)
    check_model_or_checkpoint(name)
    if is_checkpoint(directory):
        with tempfile.TemporaryDirectory(prefix="lopt-pp-") as scratch:
            export(directory, Path(scratch) / "model", trust_remote_code)
            yield str(Path(scratch) / "model")
        return
    yield name
