"""The model card of a trained model."""

from collections.abc import Sequence
from importlib.metadata import version

from lopt_pp.config import Config
from lopt_pp.data import Rows

_CARD = """\
---
library_name: transformers
base_model: {model}
tags:
- lopt
---

# {name}

[{model}]({link}) post-trained with LoPT-PP {version}, by local learning (LoPT, arXiv 2605.04913): the model was cut
into {num_stages} blocks of layers; the last block learned from the next-token loss, each earlier one from the
reconstruction of its own input, and no gradient crossed a cut. The small heads that reconstruct existed only in
training. The input and output embeddings are separate tensors, since two blocks owned them.

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
        link=f"https://huggingface.co/{model}" if not model.startswith((".", "/")) else model,
        version=version("lopt-pp"),
        num_stages=config.pipeline.num_stages,
        data=rows.summary(),
        steps=steps,
        flags="\n".join(
            f"| `--{name}` | {_shown(value)} |" for name, value in config.flags().items() if value is not None
        ),
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
