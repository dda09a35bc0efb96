"""The recipes of launch/recipes: each parses, says what `lopt-pp plan` says, and trains in miniature."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import ranks
from results import weights
from tiny import InputsWith, write_rows
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from lopt_pp import cli, load_config
from lopt_pp.distributed.process_count import count_processes

FOLDER = Path(__file__).parent.parent.parent / "launch" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))

by_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)

MODELS: dict[str, PreTrainedConfig] = {
    "HuggingFaceTB/SmolLM2-360M-Instruct": LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-1.7B": Qwen3Config(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    ),
    "google/gemma-2-9b-it": Gemma2Config(
        vocab_size=256000,
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        max_position_embeddings=8192,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    ),
    "Qwen/Qwen2.5-32B-Instruct": Qwen2Config(
        vocab_size=152064,
        hidden_size=5120,
        intermediate_size=27648,
        num_hidden_layers=64,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    ),
}
"""The models that the recipes name, by the sizes in their public configs. No hub is needed."""

NO_MEMORY = {"learning_rate", "lr_scheduler_type", "warmup_ratio"}
"""Settings of a recipe that `lopt-pp plan` takes, and that change none of its numbers."""

MINIATURE = {
    "max_length": 128,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "eval_split_size": 8,
}
"""What is smaller in a test, besides model and rows. All else is as the recipe says."""

MOST_PROCESSES = 4


def settings(recipe: Path) -> dict[str, Any]:
    return yaml.safe_load(recipe.read_text())


def processes(recipe: Path) -> int:
    """The number of processes that it is for."""
    given = settings(recipe)
    return given.get("pipeline_processes", given["num_stages"]) * given.get("data_parallel", 1)


def head(recipe: Path) -> str:
    """The comment at its top, with continued lines joined."""
    lines = recipe.read_text().split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in lines)
    return "\n".join(line[1:].strip() for line in lines).replace("\\\n", " ")


def commands(recipe: Path, *words: str) -> list[list[str]]:
    """The commands in its head that have all these words in them."""
    found = [shlex.split(line) for line in head(recipe).splitlines() if all(word in line for word in words)]
    assert found, f"{recipe.name} has no line with {words}"
    return found


def value_after(words: list[str], flag: str) -> str:
    return words[words.index(flag) + 1]


@by_recipe
def test_a_recipe_parses(recipe: Path) -> None:
    config = load_config(recipe)
    assert config.pipeline.topology(processes(recipe)).num_stages == settings(recipe)["num_stages"]


@by_recipe
def test_the_command_that_starts_it_starts_as_many_processes(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "run.yaml"
    for words in commands(recipe, name):
        if words[:2] == ["lopt-pp", "submit"]:
            copy = tmp_path / recipe.name
            copy.write_text(recipe.read_text())
            write_rows(tmp_path / settings(recipe)["train_file"], number=4)
            monkeypatch.chdir(tmp_path)
            assert cli.main([copy.name if word == name else word for word in words[1:]] + ["--dry-run"]) == 0
            assert "#SBATCH" in capsys.readouterr().out
            started = int(value_after(words, "--nodes")) * int(value_after(words, "--gpus-per-node"))
        elif any(word.endswith("several_machines.sh") for word in words):
            given = dict(word.split("=") for word in words[: words.index("bash")])
            started = int(given.get("NNODES", 2)) * int(given.get("NPROC_PER_NODE", 1))
            assert (FOLDER.parent.parent / words[words.index("bash") + 1]).is_file()
        else:  # On a machine with as many GPUs as it asks for, and one too many.
            assert words == ["lopt-pp", "train", name]
            started = count_processes(load_config(recipe), None, lambda: processes(recipe) + 1).number
        if "submit" not in words and words[0] != "lopt-pp":
            assert value_after(words, "--config") == name
        assert started == processes(recipe)


@pytest.mark.slow
@by_recipe
def test_its_plan_is_what_plan_says(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers in its head, and the command that they are printed by."""
    (words,) = commands(recipe, "lopt-pp plan", "--")
    given = settings(recipe)
    flags = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["lopt-pp", "plan", given["model_name_or_path"]]
    memory = flags.pop("--gpu_memory")
    named = {name.removeprefix("--"): yaml.safe_load(value) for name, value in flags.items()}
    assert named == {name: given[name] for name in named}

    # The plan is of all that the recipe says; what the command leaves out is a default, or changes nothing.
    with pytest.raises(SystemExit):
        cli.main(["plan", "--help"])
    planned = set(re.findall(r"^  --(\w+) ", capsys.readouterr().out, re.MULTILINE)) & given.keys() - {
        "model_name_or_path"
    }
    defaults = load_config(model_name_or_path="a", train_file="b", output_dir="c")
    assert {name for name in planned - named.keys() - NO_MEMORY if given[name] != default(defaults, name)} == set()
    MODELS[given["model_name_or_path"]].save_pretrained(tmp_path)
    run = tmp_path / "plan.yaml"
    run.write_text(yaml.safe_dump({name: given[name] for name in planned}))
    assert (
        cli.main(["plan", str(tmp_path / "config.json"), "--config", str(run), "--gpu_memory", memory, "--json"]) == 0
    )
    found = json.loads(capsys.readouterr().out)

    assert found["fits"]
    said = {number: float(size) for number, size in re.findall(r"process (\d+): ([\d.]+) GiB", head(recipe))}
    assert said == {str(number): gib(entry) for number, entry in enumerate(found["processes"])}
    for size in re.findall(r"end to end in one process: ([\d.]+) GiB", head(recipe)):
        assert float(size) == gib(found["end_to_end"]["one_process"])
    for megabytes, rate in re.findall(
        r"boundary: ([\d.]+) MB per microbatch, ([\d.]+) MB/s for each TFLOP/s", head(recipe)
    ):
        assert float(megabytes) == round(found["boundary"]["bytes_per_microbatch"] / 1e6, 1)
        assert float(rate) == round(found["boundary"]["bytes_per_operation"] * 1e6, 2)


def default(config: object, name: str) -> object:
    """The value of a flag in a config of defaults, whichever component it belongs to."""
    return next(getattr(component, name) for component in vars(config).values() if hasattr(component, name))


def gib(entry: dict[str, Any]) -> float:
    return round(entry["total"] / 2**30, 1)


def test_the_table_has_every_recipe() -> None:
    """With its fullest GPU."""
    text = (FOLDER / "README.md").read_text()
    rows = {name: row for row in text.splitlines() for name in re.findall(r"\]\((\w+\.yaml)\)", row)}
    assert rows.keys() == {recipe.name for recipe in RECIPES}
    for recipe in RECIPES:
        fullest = max(re.findall(r"process \d+: ([\d.]+) GiB", head(recipe)), key=float)
        assert f" {fullest} GiB " in rows[recipe.name]
        assert settings(recipe)["model_name_or_path"].split("/")[1].removesuffix("-Instruct") in rows[recipe.name]


@pytest.mark.slow
@by_recipe
def test_it_trains_in_miniature(recipe: Path, inputs_with: InputsWith, tmp_path: Path) -> None:
    """A model of its family with all of its flags but sizes and places, in at most four processes, on CPUs."""
    model = MODELS[settings(recipe)["model_name_or_path"]]
    files = inputs_with(rows=200, family=model.model_type, tie_word_embeddings=model.tie_word_embeddings)
    out = tmp_path / "out"
    places = {"model_name_or_path": files / "model", "train_file": files / "rows.jsonl", "output_dir": out}
    number = processes(recipe)
    if number > MOST_PROCESSES:  # All of its stages none the less, some of them in one process.
        number, fewer = MOST_PROCESSES, {"pipeline_processes": 2, "data_parallel": 2}
    else:
        fewer = {}
    smaller = {f"--{name}": str(value) for name, value in (places | MINIATURE | fewer).items()}
    arguments = ["--config", str(recipe), *(word for pair in smaller.items() for word in pair)]
    with ranks(tmp_path, *[arguments] * number) as started:
        for rank in started:
            assert rank.status(240) == 0, rank.text

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trained = {(record["stage"], record["step"]) for record in records if "num_tokens" in record}
    assert {stage for stage, _ in trained} == set(range(settings(recipe)["num_stages"]))
    assert {step for _, step in trained} >= {1, 2}
    before, after = weights(files / "model"), weights(out)
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    trained_model = AutoModelForCausalLM.from_pretrained(out)
    assert trained_model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()
