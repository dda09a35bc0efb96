"""The model card: what of it is a name on the hub, and what is left out because it is a place."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from lopt_pp.checkpoint.best import Measured
from lopt_pp.checkpoint.card_metadata import base_model, card_of, hub_id
from lopt_pp.checkpoint.model_card import Effort, Trained, model_card, plain_card
from lopt_pp.config.model import ModelConfig
from lopt_pp.config.parser import parse_config
from lopt_pp.data.evaluation_sets import EvaluationSets


@dataclass(frozen=True)
class SomeRows:
    """As much of rows as a card looks at."""

    source: str

    def __len__(self) -> int:
        return 5

    def summary(self) -> str:
        return f"40 rows of {self.source}: 35 used"


def card(source: str, *flags: str, name: str | None = None, measured: Measured | None = None) -> ModelCard:
    config = parse_config(["--output_dir", "here/out", *flags])
    held_out = EvaluationSets({"": SomeRows(source)}) if measured is not None else None  # type: ignore[dict-item]
    trained = Trained(config, SomeRows(source), 4, held_out, False, True, name)  # type: ignore[arg-type]
    return ModelCard(model_card(trained, [4, 4], measured, Effort(1234, 3723.0, ["A", "A", "B"])))


def test_what_is_on_the_hub_is_named() -> None:
    flags = ["--model_name_or_path", "an-org/a-model", "--dataset_name", "openai/gsm8k", "--dataset_config", "main"]
    flags += ["--dataset_test_split", "test", "--license", "mit"]
    made = card("openai/gsm8k, main", *flags, name="me/mine", measured=Measured({"eval_loss": 0.5}, 4))
    data = made.data.to_dict()
    assert (data["base_model"], data["datasets"], data["license"]) == ("an-org/a-model", ["openai/gsm8k"], "mit")
    ((loss, exponential),) = [result["results"][0]["metrics"] for result in data["model-index"]]
    assert (loss["type"], loss["value"], exponential["type"]) == ("loss", 0.5, "perplexity")
    assert data["model-index"][0]["name"] == "mine"
    assert data["model-index"][0]["results"][0]["dataset"] == {
        "name": "openai/gsm8k",
        "type": "openai/gsm8k",
        "config": "main",
        "split": "test",
    }
    assert "Data: 40 rows of openai/gsm8k: 35 used\n" in made.text
    assert "\nLoss on 5 held-out rows of openai/gsm8k: 0.5 (perplexity 1.649)\n" in made.text
    assert 'pipeline("text-generation", "me/mine")' in made.text
    assert "Trained: 1,234 tokens in 1 h 02 min on 2 x A, 1 x B\n" in made.text


def test_a_mixture_names_what_is_on_the_hub_and_no_place() -> None:
    files = {"path": "json", "data_files": "/a-place/rows.jsonl"}
    entries = [{"path": "an-org/rows"}, files, {"path": "/a-place/more"}]
    flags = ["--model_name_or_path", "/a-place/model", "--datasets", *map(json.dumps, entries)]
    made = card("3 data sets (an-org/rows; /a-place/rows.jsonl; /a-place/more)", *flags)
    assert made.data.to_dict()["datasets"] == ["an-org/rows"] and "base_model" not in made.data.to_dict()
    assert "Data: 40 rows of an-org/rows, local files: 35 used\n" in made.text
    assert "a-place" not in str(made)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("an-org/a-model", "an-org/a-model"),
        ("gpt2", "gpt2"),
        ("LlamaForCausalLM", None),
        ("/a/model", None),
        ("./a/model", None),
        ("runs/out/checkpoint-5", None),
        ("a model", None),
    ],
)
def test_names_of_the_hub(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_a_directory_is_what_the_cache_or_its_card_says(tmp_path: Path) -> None:
    cached = tmp_path / "models--an-org--a-model" / "snapshots" / "0123"
    cached.mkdir(parents=True)
    assert base_model(ModelConfig(str(cached)), {}) == "an-org/a-model"
    (tmp_path / "README.md").write_text("---\nbase_model:\n- an-org/another\nlicense: mit\n---\n")
    (tmp_path / "config.json").write_text("{}")
    config = ModelConfig(str(tmp_path))
    assert base_model(config, card_of(config)) == "an-org/another"
    (tmp_path / "README.md").write_text("---\nbase_model: /a-place/model\n---\n")
    assert base_model(config, card_of(config)) is None
    (tmp_path / "README.md").write_text("---\nbase_model: [\n---\n")
    assert card_of(config) == {}


def test_a_model_of_which_nothing_is_known_has_a_card() -> None:
    made = ModelCard(plain_card("me/mine"))
    assert made.data.to_dict()["library_name"] == "transformers" and made.text.startswith("\n# mine\n")
