"""The names in manifests: identifiers since format 2, and those of format 1 that they are read as."""

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from lopt_pp.checkpoint.compatibility import LEFT_OUT, may_change, must_match
from lopt_pp.checkpoint.manifest import read_manifest, seal, write_manifest
from lopt_pp.checkpoint.output_dir import INDEX_FILE
from lopt_pp.checkpoint.resume import Wanted, find_start
from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import World
from lopt_pp.errors import LoptError

STORED = Path(__file__).with_name("manifest_of_format_1.json")
"""Written by the last version that wrote format 1, for a run of two replicas with these flags."""

FLAGS = (
    "--model_name_or_path a-model --train_file rows.jsonl --output_dir out --packing true --max_length 512 "
    "--local_objective next_token --auxiliary_layers 1 --gradient_accumulation_steps 4 --learning_rate 1e-3 "
    "--lr_scheduler_type cosine --dtype bfloat16 --eval_file held.jsonl --save_steps 100"
)
MODEL = LlamaConfig(num_hidden_layers=4, hidden_size=32, vocab_size=64)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint-120"
    directory.mkdir()
    shutil.copy(STORED, directory / "manifest.json")
    return directory


def go_on(checkpoint: Path, *flags: str) -> int:
    """The steps done where a run with these flags goes on; the model's config is the checkpoint's."""
    config = parse_config([*FLAGS.split(), *flags])
    rows: Any = SimpleNamespace(digest="a" * 64)
    held_out: Any = SimpleNamespace(digest="b" * 64)
    manifest = read_manifest(checkpoint)
    # What transformers writes of a model may change with its version.
    model_config = {"model_config": manifest.run["model_config"]}
    store = dist.HashStore()
    run = must_match(config, MODEL, rows, 2) | model_config, may_change(config, 400, held_out)
    return find_start(
        World(0, 1, torch.device("cpu"), "gloo", store, store),
        Wanted(str(checkpoint), checkpoint.parent, False, 400, *run, digest_without=str, source="rows.jsonl"),
        stages=[],
        specs=manifest.specs,
        checks_parts=False,
    ).steps_done


def test_a_run_goes_on_from_format_1_without_a_warning(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert go_on(checkpoint) == 120
    assert caplog.records == []


def test_what_format_1_says_is_refused_and_warned_of_in_the_same_words(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LoptError, match="is of another run: --seed is 7, and was 42; give the flags and rows"):
        go_on(checkpoint, "--seed", "7")
    with pytest.raises(LoptError, match="is of another run: the rows of a step is 32, and was 64; give the flags"):
        go_on(checkpoint, "--gradient_accumulation_steps", "2")
    with caplog.at_level(logging.WARNING):
        assert go_on(checkpoint, "--learning_rate", "2e-3") == 120
    said = "going on with another setting than before: --learning_rate is 0.002, and was 0.001"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_all_names_of_format_1_are_read_as_todays(checkpoint: Path) -> None:
    assert json.loads(STORED.read_text())["format"] == 1
    manifest = read_manifest(checkpoint)
    assert all(name.isidentifier() for name in manifest.run)
    config = parse_config(FLAGS.split())
    rows: Any = SimpleNamespace(digest="a" * 64)
    held_out: Any = SimpleNamespace(digest="b" * 64)
    today = must_match(config, MODEL, rows, 2) | may_change(config, 400, held_out)
    newer = {name: LEFT_OUT[name] for name in today.keys() - manifest.run.keys()}
    assert manifest.run | newer | {"model_config": ""} == today | {"model_config": ""}
    assert (manifest.step, manifest.eval_loss, [spec.stop for spec in manifest.specs]) == (120, 2.5, [2, 4])


def test_what_is_read_is_written_in_format_2(checkpoint: Path, tmp_path: Path) -> None:
    old = read_manifest(checkpoint)
    parts = [{"size": part.size, "sha256": part.sha256} for part in old.parts]
    content = {"step": 120, "edges": [2, 4], "run": old.run, "parts": parts, "metrics": {"eval_loss": 2.5}}
    write_manifest(tmp_path, content)
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["format"] == 2 and written["run"] == old.run
    new = read_manifest(tmp_path)
    assert (new.run, new.parts, new.specs, new.step) == (old.run, old.parts, old.specs, old.step)


@pytest.mark.parametrize("later", [3, 0, "2", None, [1]])
def test_another_format_is_refused_by_its_version(later: object, checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    path.write_text(json.dumps(seal(content | {"format": later})))
    with pytest.raises(LoptError, match=r"manifest.json has the format .*, and this version reads 1 and 2$") as refused:
        read_manifest(checkpoint)
    assert f"has the format {later!r}," in str(refused.value)


def test_the_index_of_a_model_has_the_name_that_transformers_gives_it() -> None:
    assert INDEX_FILE == SAFE_WEIGHTS_INDEX_NAME
