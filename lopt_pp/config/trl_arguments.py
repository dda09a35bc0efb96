"""What becomes of the arguments of TRL's `SFTTrainer` in a `Trainer`, which has them in the same order.

docs/trl.md shows it, and what is refused is refused with these words.
"""

from dataclasses import dataclass

from lopt_pp.config.foreign_rules import MISSING, SAME


@dataclass(frozen=True)
class Argument:
    """An argument.

    Attributes:
        name: of it, in both.
        here: `SAME`, or `MISSING` where it is refused.
        note: what docs/trl.md says of it, and the error where it is refused; in Markdown.
    """

    name: str
    here: str
    note: str = ""


ARGUMENTS: tuple[Argument, ...] = (
    Argument("model", SAME, "trained in place where there is one process; a config of `load_config` may stand here"),
    Argument(
        "args",
        SAME,
        "an `SFTConfig`, of which counts what is not its default, and its `bf16` and `gradient_checkpointing`; or a "
        "dict, a YAML file, what `load_config` returns",
    ),
    Argument("data_collator", MISSING, "rows become microbatches by the flags: `--packing`, `--padding_free`"),
    Argument("train_dataset", SAME, "or a list of dicts; an `IterableDataset` is read before the first step"),
    Argument("eval_dataset", SAME, "likewise; several by name in a dict"),
    Argument("processing_class", SAME, "a tokenizer; it stays as it is"),
    Argument("compute_loss_func", MISSING, "what a block learns from is an objective: [write one](objectives.md)"),
    Argument(
        "compute_metrics",
        SAME,
        "`predictions` are the likeliest tokens, in place of logits: [metrics of your own](evaluation.md)",
    ),
    Argument(
        "callbacks",
        SAME,
        "called on rank 0; what their control asks for is done some steps later, but for `should_epoch_stop`: no "
        "epoch is cut short",
    ),
    Argument("optimizers", SAME, "a class or a function that makes each stage's, and not an optimizer; no schedule"),
    Argument("optimizer_cls_and_kwargs", SAME, "of each stage"),
    Argument("preprocess_logits_for_metrics", MISSING, "logits are never held, so there are none to make less of"),
    Argument("quantization_config", MISSING, "weights are trained as they are, and not quantized"),
    Argument("peft_config", MISSING, "all weights of a stage are trained; adapters are not supported"),
    Argument("formatting_func", SAME, "makes one text of a row"),
)
