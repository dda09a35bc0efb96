"""The model card of a trained model: how it came about and how it is used, with no name of a machine and no path."""

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version

from lopt_pp.checkpoint.best import Measured
from lopt_pp.checkpoint.card_metadata import (
    HeldOut,
    base_model,
    card_of,
    datasets,
    has_local_rows,
    head,
    hub_id,
    license_of,
)
from lopt_pp.checkpoint.output_dir import ModelOrigin
from lopt_pp.config.data import DataConfig
from lopt_pp.config.evaluation import eval_prefix
from lopt_pp.config.train_config import PATHS, Config
from lopt_pp.data import Rows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.evaluation.scores import perplexity
from lopt_pp.objectives import local_objective_class

TAGS = ("lopt-pp", "sft")

_VERSIONS = ("lopt-pp", "torch", "transformers", "datasets")


@dataclass(frozen=True)
class Effort:
    """What a run took, all of its starts together.

    Attributes:
        num_tokens: that were trained on, those of prompts and of earlier epochs among them.
        seconds: of the training steps.
        devices: that trained, each as often as it was there.
    """

    num_tokens: int
    seconds: float
    devices: Sequence[str]

    def __str__(self) -> str:
        minutes, seconds = divmod(round(self.seconds), 60)
        hours, minutes = divmod(minutes, 60)
        time = f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"
        kinds = dict.fromkeys(self.devices)
        where = ", ".join(f"{self.devices.count(kind)} x {kind}" for kind in kinds)
        return f"{self.num_tokens:,} tokens in {time}" + (f" on {where}" if where else "")


@dataclass(frozen=True)
class Trained:
    """What a card tells of a run.

    Attributes:
        config: of the run.
        rows: trained on.
        num_steps: of the run.
        held_out: not trained on; None where there are none.
        ties_embeddings: whether the output head is the input embedding.
        has_chat_template: whether the tokenizer has one.
        repository: the model's name on the hub; None where it is not pushed there.
    """

    config: Config
    rows: Rows
    num_steps: int
    held_out: EvaluationSets | None = None
    ties_embeddings: bool = False
    has_chat_template: bool = False
    repository: str | None = None


def model_card(
    trained: Trained,
    steps_done: Sequence[int],
    measured: Measured | None = None,
    effort: Effort | None = None,
    origin: ModelOrigin | None = None,
) -> str:
    """The card's text.

    Args:
        trained: the run.
        steps_done: optimizer steps of each stage; fewer than the run has where it ended early or goes on.
        measured: which model this is, and what it does on the held-out rows; None where it was not measured.
        effort: what the training took; None where that is not known.
        origin: how many steps the run has made, where it may have finished early.
    """
    config, held_out = trained.config, trained.held_out
    card, trained_on = card_of(config.model), datasets(config.data)
    base = base_model(config.model, card)
    name = (trained.repository or config.run.output_dir.rstrip("/")).split("/")[-1]
    is_local = local_objective_class(config.objective) is not None and config.pipeline.num_stages > 1
    result = _result(config, held_out, trained_on, measured)
    parts = [
        head(
            name,
            [*TAGS, *(["lopt"] if is_local and config.objective.method != "e2e" else [])],
            base,
            trained_on,
            license_of(config.hub.license, card),
            result,
        ),
        f"# {name}\n",
        f"{_story(config, base, trained.ties_embeddings)}\n",
        usage(trained.repository, trained.has_chat_template),
        "## Training\n",
        f"Data: {_public(trained.rows.summary(), trained.rows.source, config.data)}\n",
        f"Optimizer steps: {_steps(config, trained.num_steps, steps_done, measured, origin)}\n",
    ]
    if effort is not None and effort.num_tokens:
        parts.append(f"Trained: {effort}\n")
    if held_out is not None and measured is not None:
        parts += _measured(held_out, trained_on, measured)
    parts.append("| flag | value |\n|---|---|\n" + "".join(f"{row}\n" for row in _flags(config)))
    parts.append("Versions: " + ", ".join(f"{library} {version(library)}" for library in _VERSIONS) + "\n")
    return "\n".join(parts)


def plain_card(repository: str) -> str:
    """The card of a model of which no more is known than that it was trained here.

    Args:
        repository: the model's name on the hub.
    """
    name = repository.split("/")[-1]
    story = f"Post-trained with LoPT-PP {version('lopt-pp')}.\n"
    return "\n".join([head(name, TAGS), f"# {name}\n", story, usage(repository, has_chat_template=False)])


def usage(repository: str | None, has_chat_template: bool) -> str:
    """How the model is run, as Markdown.

    Args:
        repository: its name on the hub; None where it is in a directory.
        has_chat_template: whether it answers messages, or goes on from a text.
    """
    given = '[{"role": "user", "content": "Hello!"}]' if has_chat_template else '"Once upon a time"'
    return (
        f"It is an ordinary model of `transformers`:\n\n```python\nfrom transformers import pipeline\n\n"
        f'generate = pipeline("text-generation", "{repository or "DIRECTORY"}")\n'
        f"print(generate({given}, max_new_tokens=256, return_full_text=False)[0]"
        f'["generated_text"])\n```\n'
    )


def _result(
    config: Config, sets: EvaluationSets | None, trained_on: Sequence[str], measured: Measured | None
) -> HeldOut | None:
    """What was measured, where the rows are those of a data set that can be named."""
    if measured is None or sets is None or len(trained_on) != 1 or list(sets.rows) != [""]:
        return None
    loss = measured.metrics.get("eval_loss")
    if loss is None or config.evaluation.eval_file is not None:
        return None
    split = config.evaluation.dataset_test_split or config.data.dataset_split
    return HeldOut(trained_on[0], config.data.dataset_config, split, loss)


def _steps(
    config: Config,
    num_steps: int,
    steps_done: Sequence[int],
    measured: Measured | None,
    origin: ModelOrigin | None,
) -> str:
    made, steps = num_steps, str(num_steps)
    if origin is not None and origin.reason is not None:
        made, steps = origin.steps_done, f"{origin.steps_done} of {num_steps}; finished early: {origin.reason}"
    if measured is not None and measured.step < made:
        return f"{steps}; these are the weights after {measured.step}, {_why_best(config)}"
    if set(steps_done) == {made}:
        return steps
    if len(set(steps_done)) == 1:
        return f"{num_steps} planned; these are the weights after {steps_done[0]}"
    done = ", ".join(f"stage {stage} has done {done}" for stage, done in enumerate(steps_done))
    return f"{num_steps} planned; the run ended early: {done}"


def _flags(config: Config) -> list[str]:
    """The flags that a result is compared by, as rows of a table; of paths those alone that are names on the hub."""
    rows = []
    for name, value in config.flags(lambda effects: effects.compared).items():
        if name == "datasets" or (name in PATHS and not (isinstance(value, str) and hub_id(value))):
            continue
        if value is not None:
            shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append(f"| `--{name}` | {shown} |")
    return rows


def _why_best(config: Config) -> str:
    metric = config.evaluation.metric_for_best_model
    if metric is None or metric in ("loss", "eval_loss"):
        return "whose loss on held-out rows was the lowest"
    return f"which were the best on held-out rows by {metric}"


def _public(text: str, source: str, config: DataConfig) -> str:
    """A text about rows, with names on the hub in place of where they were read."""
    names = [*datasets(config), *(["local files"] if has_local_rows(config) else [])]
    return text.replace(source, ", ".join(names))


def _measured(sets: EvaluationSets, trained_on: Sequence[str], measured: Measured) -> Iterator[str]:
    """A line for each set of held-out rows."""
    for name, rows in sets.rows.items():
        loss = measured.metrics.get(f"{eval_prefix(name)}loss", math.inf)
        where = "".join(f" of {dataset}" for dataset in trained_on if rows.source.startswith(dataset))
        called = f" ({name})" if name else ""
        exponential = f"perplexity {perplexity(loss):.4g}"
        yield f"Loss on {len(rows)} held-out rows{where}{called}: {loss:.4g} ({exponential})\n"


def _story(config: Config, base: str | None, ties_embeddings: bool) -> str:
    """How the model came about, in a paragraph."""
    number = config.pipeline.num_stages
    local = local_objective_class(config.objective)
    model = f"[{base}](https://huggingface.co/{base})" if base is not None else "A model"
    begun = f"{model}, post-trained with LoPT-PP {version('lopt-pp')}"
    if config.objective.method == "e2e" or number == 1:
        how = ", end to end."
    elif local is None:
        how = (
            f": the model was cut into {number} blocks of layers; the last block learned from the next-token loss, and "
            f"the earlier ones stayed as they were."
        )
    else:
        how = (
            f", by local learning ([LoPT](https://arxiv.org/abs/2605.04913)): the model was cut into {number} blocks "
            f"of layers; the last block learned from the next-token loss, each earlier one from {local.summary}, and "
            f"no gradient crossed a cut. What only the local losses needed existed only in training."
        )
    embeddings = "one tensor" if ties_embeddings else "separate tensors"
    return textwrap.fill(f"{begun}{how} The input and output embeddings are {embeddings}.", 120)
