"""The model card of a trained model."""

import textwrap
from collections.abc import Sequence
from importlib.metadata import version

from lopt_pp.config import Config
from lopt_pp.data import Rows
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

Optimizer steps: {steps}

| flag | value |
|---|---|
{flags}
"""


def model_card(config: Config, rows: Rows, steps_done: Sequence[int], num_steps: int) -> str:
    """The card's text.

    Args:
        config: of the run.
        rows: trained on.
        steps_done: optimizer steps of each stage; fewer than `num_steps` where a run ended early.
        num_steps: of the run.
    """
    model = config.model.model_name_or_path
    steps = str(num_steps)
    if set(steps_done) != {num_steps}:
        done = ", ".join(f"stage {stage} has done {done}" for stage, done in enumerate(steps_done))
        steps = f"{num_steps} planned; the run ended early: {done}"
    return _CARD.format(
        model=model,
        name=config.run.output_dir.rstrip("/").split("/")[-1],
        story=_story(config, f"https://huggingface.co/{model}" if not model.startswith((".", "/")) else model),
        data=rows.summary(),
        steps=steps,
        flags="\n".join(
            f"| `--{name}` | {_shown(value)} |" for name, value in config.flags().items() if value is not None
        ),
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _story(config: Config, link: str) -> str:
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
    return textwrap.fill(f"{begun}{how} The input and output embeddings are separate tensors.", 120)
