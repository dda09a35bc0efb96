"""The model card of a trained model."""

import math
import textwrap
from collections.abc import Sequence
from importlib.metadata import version

from lopt_pp.checkpoint.best import Measured
from lopt_pp.checkpoint.output_dir import ModelOrigin
from lopt_pp.config.evaluation import eval_prefix
from lopt_pp.config.train_config import Config
from lopt_pp.data import Rows
from lopt_pp.data.evaluation_sets import EvaluationSets
from lopt_pp.evaluation.scores import perplexity
from lopt_pp.objectives import local_objective_class

_CARD = """\
---
library_name: transformers
base_model: {model}
tags:
- lopt
---

# {name}

{story}

It is an ordinary model of `transformers`:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

## Training

Data: {data}

Optimizer steps: {steps}{measured}

| flag | value |
|---|---|
{flags}
"""


def model_card(
    config: Config,
    rows: Rows,
    steps_done: Sequence[int],
    num_steps: int,
    held_out: EvaluationSets | None = None,
    measured: Measured | None = None,
    ties_embeddings: bool = False,
    origin: ModelOrigin | None = None,
) -> str:
    """The card's text.

    Args:
        config: of the run.
        rows: trained on.
        steps_done: optimizer steps of each stage; fewer than `num_steps` where a run ended early.
        num_steps: of the run.
        held_out: not trained on; None where there are none.
        measured: which model this is, and what it does on the held-out rows; None where it was not measured.
        ties_embeddings: whether the output head is the input embedding.
        origin: how many steps the run has made, where it may have finished early.
    """
    model = config.model.model_name_or_path
    made, steps = num_steps, str(num_steps)
    if origin is not None and origin.reason is not None:
        made, steps = origin.steps_done, f"{origin.steps_done} of {num_steps}; finished early: {origin.reason}"
    if measured is not None and measured.step < made:
        steps += f"; these are the weights after {measured.step}, {_why_best(config)}"
    elif set(steps_done) != {made}:
        done = ", ".join(f"stage {stage} has done {done}" for stage, done in enumerate(steps_done))
        steps = f"{num_steps} planned; the run ended early: {done}"
    return _CARD.format(
        model=model,
        name=config.run.output_dir.rstrip("/").split("/")[-1],
        story=_story(
            config, f"https://huggingface.co/{model}" if not model.startswith((".", "/")) else model, ties_embeddings
        ),
        data=rows.summary(),
        steps=steps,
        measured=f"\n\n{_measured(held_out, measured)}" if held_out is not None and measured is not None else "",
        flags="\n".join(
            f"| `--{name}` | {_shown(value)} |" for name, value in config.flags().items() if value is not None
        ),
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _why_best(config: Config) -> str:
    metric = config.evaluation.metric_for_best_model
    if metric is None or metric in ("loss", "eval_loss"):
        return "whose loss on held-out rows was the lowest"
    return f"which were the best on held-out rows by {metric}"


def _measured(sets: EvaluationSets, measured: Measured) -> str:
    lines = []
    for name, rows in sets.rows.items():
        prefix = eval_prefix(name)
        loss = measured.metrics.get(f"{prefix}loss", math.inf)
        called = f" ({name})" if name else ""
        exponential = f"perplexity {perplexity(loss):.4g}"
        lines.append(f"Loss on {len(rows)} held-out rows of {rows.source}{called}: {loss:.4g} ({exponential})")
    return "\n\n".join(lines)


def _story(config: Config, link: str, ties_embeddings: bool) -> str:
    """How the model came about, in a paragraph."""
    model, number = config.model.model_name_or_path, config.pipeline.num_stages
    local = local_objective_class(config.objective)
    begun = f"[{model}]({link}) post-trained with LoPT-PP {version('lopt-pp')}"
    if config.objective.method == "e2e" or number == 1:
        how = ", end to end."
    elif local is None:
        how = (
            f": the model was cut into {number} blocks of layers; the last block learned from the next-token loss, and "
            f"the earlier ones stayed as they were."
        )
    else:
        how = (
            f", by local learning (LoPT, arXiv 2605.04913): the model was cut into {number} blocks of layers; the last "
            f"block learned from the next-token loss, each earlier one from {local.summary}, and no gradient crossed a "
            f"cut. What only the local losses needed existed only in training."
        )
    embeddings = "one tensor" if ties_embeddings else "separate tensors"
    return textwrap.fill(f"{begun}{how} The input and output embeddings are {embeddings}.", 120)
