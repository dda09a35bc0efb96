"""Every shape of data trains, packed and not, tokenized before or on the way, and gives the same losses."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny import write_model

from lopt_pp.config.parser import parse_config
from lopt_pp.distributed.world import connect
from lopt_pp.training.run import run

SUMS = [(f"what is {a} + {b}?", f"{a + b}") for a, b in ((1, 2), (30, 4), (5, 60), (77, 88), (9, 9), (100, 23))]
TURNS = [[{"role": "user", "content": ask}, {"role": "assistant", "content": reply}] for ask, reply in SUMS]


def from_value(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


FORMATS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": [*turns, *more]} for turns, more in zip(TURNS, TURNS[::-1], strict=True)],
    "conversations": [{"conversations": from_value(turns)} for turns in TURNS],
    "prompt and completion": [{"prompt": ask, "completion": reply} for ask, reply in SUMS],
    "lists of messages": [{"prompt": turns[:1], "completion": turns[1:]} for turns in TURNS],
    "alpaca": [{"instruction": ask, "input": "now", "output": reply} for ask, reply in SUMS],
    "question and answer": [{"question": ask, "answer": reply} for ask, reply in SUMS],
    "query and response": [{"query": ask, "response": reply} for ask, reply in SUMS],
    "problem and solution": [{"problem": ask, "solution": reply} for ask, reply in SUMS],
    "text": [{"text": ask + reply} for ask, reply in SUMS],
    "tokenized": [
        {"input_ids": list(range(4, 8 + n)), "labels": [-100] * 4 + list(range(8, 8 + n))} for n in range(2, 8)
    ],
}

PRESETS = {"metamathqa": "query and response", "alpaca": "alpaca", "tulu3": "messages", "gsm8k": "question and answer"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2, max_position_embeddings=1024)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def train(model: Path, rows: list[dict[str, Any]], folder: Path, flags: str = "") -> list[tuple[float, float, int]]:
    """Of each step of a run over all rows: the losses of both stages, and the number of tokens."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    given = f"--model_name_or_path {model} --train_file {file} --max_steps 2 --per_device_train_batch_size 3"
    given += f" --gradient_accumulation_steps 2 --learning_rate 1e-3 --backend gloo {flags}"
    config = parse_config([*given.split(), "--output_dir", str(out)])
    with connect(config.pipeline) as world:
        run(config, world)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    first, last = ([record for record in records if record["stage"] == stage] for stage in (0, 1))
    return [(a["reconstruction_loss"], b["loss"], b["num_tokens"]) for a, b in zip(first, last, strict=True)]


@pytest.mark.parametrize("shape", FORMATS)
def test_every_shape_trains(shape: str, model: Path, tmp_path: Path) -> None:
    plain = train(model, FORMATS[shape], tmp_path)
    assert len(plain) == 2 and plain[0] != plain[1]
    packed = train(model, FORMATS[shape], tmp_path, "--packing --max_length 1024")
    streamed = train(model, FORMATS[shape], tmp_path, "--streaming")
    assert streamed == plain
    for one, other in zip(packed, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_streamed_packed_and_padding_free_rows_train_alike(model: Path, tmp_path: Path) -> None:
    rows = FORMATS["messages"]
    plain = train(model, rows, tmp_path)
    for flags in ("--padding_free", "--padding_free --streaming", "--padding_free --packing"):
        for one, other in zip(train(model, rows, tmp_path, flags), plain, strict=True):
            assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset: str, model: Path, tmp_path: Path) -> None:
    rows = FORMATS[PRESETS[preset]]
    assert len(train(model, rows, tmp_path, f"--dataset_mapping {preset} --packing")) == 2


@pytest.mark.parametrize(
    "layout", ["", "--packing --max_length 64", "--packing --packing_strategy wrapped --max_length 32"]
)
def test_a_streamed_run_goes_on_in_the_middle_of_an_epoch(layout: str, model: Path, tmp_path: Path) -> None:
    sums = [{"question": f"what is {i} + {i * i}?", "answer": f"{i + i * i}"} for i in range(60)]
    flags = f"--streaming --max_steps 5 --save_steps 2 {layout}"
    whole = train(model, sums, tmp_path, flags)
    (out,) = tmp_path.glob("out*")
    rest = train(model, sums, tmp_path, f"{flags} --save_steps 0 --resume_from_checkpoint {out / 'checkpoint-2'}")
    assert rest == whole[2:]
    (other,) = set(tmp_path.glob("out*")) - {out}
    one, two = (
        {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for folder in (out, other)
    )
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
