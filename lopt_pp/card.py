"""The model card of a trained model."""

from collections.abc import Sequence
from importlib.metadata import version

from lopt_pp.best import Measured
from lopt_pp.config import Config
from lopt_pp.data import Rows, TokenizedRows
from lopt_pp.metrics import perplexity

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
    held_out: TokenizedRows | None = None,
    measured: Measured | None = None,
) -> str:
    """The card's text.

    Args:
        config: of the run.
        rows: trained on.
        steps_done: optimizer steps of each stage; fewer than `num_steps` where a run ended early.
        num_steps: of the run.
        held_out: not trained on; None where there are none.
        measured: which model this is, and its loss on the held-out rows; None where it was not measured.
    """
    model = config.model.model_name_or_path
    steps = str(num_steps)
    if measured is not None and measured.step < num_steps:
        steps = f"{num_steps}; these are the weights after {measured.step}, whose loss on held-out rows was the lowest"
    elif set(steps_done) != {num_steps}:
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
        measured=f"\n\n{_measured(held_out, measured)}" if held_out is not None and measured is not None else "",
        flags="\n".join(
            f"| `--{name}` | {_shown(value)} |" for name, value in config.flags().items() if value is not None
        ),
    )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _measured(rows: TokenizedRows, measured: Measured) -> str:
    exponential = f"perplexity {perplexity(measured.loss):.4g}"
    return f"Loss on {len(rows)} held-out rows of {rows.source}: {measured.loss:.4g} ({exponential})"
