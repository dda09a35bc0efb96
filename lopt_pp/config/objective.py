"""The flags of the local objectives."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.config.evaluation import TOKEN_METRICS
from lopt_pp.config.fields import Resume, check_types, flag
from lopt_pp.errors import LoptError

_DEFAULT = "reconstruction"
EVEN, ALL = "even", "all"
"""Of `--auxiliary_choice`, besides numbers."""


@dataclass(frozen=True)
class LocalRates:
    """The default learning rate of a local objective, and what was measured to be safe (docs/quality.md).

    The objective's class takes its attributes of these names from here. `lopt-pp report` reads them here, too, since
    importing the class would import PyTorch.

    Attributes:
        rate_share: the block's peak learning rate by default, as a share of `--learning_rate`.
        safe_rate_share: the largest such share that did no harm.
        needs_head_warmup: whether that holds only with `--local_head_warmup_steps`.
    """

    rate_share: float
    safe_rate_share: float
    needs_head_warmup: bool = False


LOCAL_RATES = {
    "reconstruction": LocalRates(rate_share=0.1, safe_rate_share=0.1),
    "next_token": LocalRates(rate_share=0.5, safe_rate_share=0.5, needs_head_warmup=True),
}
"""Of each local objective that ships with the program, by its `--local_objective`."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What the blocks learn from."""

    _argument_group_name: ClassVar[str] = "Local objectives"

    method: Literal["lopt", "frozen", "e2e"] = field(
        default="lopt",
        metadata=flag(
            "lopt: the last block learns from the task, every earlier one from its --local_objective. frozen: "
            "short for --local_objective none, the cheap baseline that local learning must beat. e2e: the whole "
            "model learns from the task, in one process or as PyTorch's 1F1B pipeline with one block in each process, "
            "for comparison. That pipeline pads all microbatches of a step alike, to its longest row; with --packing "
            "little is padded.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    local_objective: str = field(
        default=_DEFAULT,
        metadata=flag(
            "What the blocks before the last learn from. reconstruction: a small head on the block's output "
            "predicts the block's own input (the paper's). next_token: an auxiliary network on the block learns the "
            "task from the same labels. none: they only run forward. package.module:Class: an objective of your own.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    reconstruction_weight: float = field(
        default=10.0,
        metadata=flag(
            "Weight of the reconstruction loss (the paper's lambda). Adam makes full-sized steps for any loss, "
            "so the block's learning rate says far more about how far it moves than this weight does.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    auxiliary_layers: int = field(
        default=2,
        metadata=flag(
            "Layers of the auxiliary network of next_token: copies of pretrained layers out of those that "
            "follow the block. Copies of the final norm and the output head come after them.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    auxiliary_choice: str = field(
        default=EVEN,
        metadata=flag(
            "Which layers these are. even: --auxiliary_layers of them, at even distances. all: every one that "
            "follows the block. Or their numbers, such as 15,19,24,29; of those each block takes the ones that follow "
            "it. `lopt-pp auxiliary` finds the ones that keep the model's function best.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    local_head_warmup_steps: int = field(
        default=0,
        metadata=flag(
            "Steps at the beginning in which an earlier block is frozen and only its head, or auxiliary network, "
            "learns, so that an untrained head does not push pretrained layers about. Later stages train as ever.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    local_accumulation_steps: int | None = field(
        default=None,
        metadata=flag(
            "Of the --gradient_accumulation_steps microbatches of a step, so many that an earlier block learns "
            "from, in turn from step to step; the others only go forward through it. Makes room on its device for a "
            "larger auxiliary network. By default it learns from all of them.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    max_interface_drift: float | None = field(
        default=None,
        metadata=flag(
            "Drift of a boundary (`drift_norm`, measured every --probe_steps) above which the stage before it "
            "stops learning for the rest of the run: from then on it only runs forward. By default it never does.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    loss_type: Literal["nll", "dft"] = field(
        default="nll",
        metadata=flag(
            "The task's loss in training: nll is cross-entropy; dft weights each token's by the probability that the "
            "model gives it (arXiv 2508.05629). Held-out losses are cross-entropy with both.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    label_smoothing_factor: float = field(
        default=0.0,
        metadata=flag(
            "Share of each target that all tokens of the vocabulary have alike, in training; 0 is off. The loss then "
            "holds all logits of a microbatch.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    router_aux_loss_coef: float = field(
        default=0.0,
        metadata=flag(
            "Weight of the loss that shares tokens out evenly among the experts of a mixture, as transformers has it: "
            "each block adds that of its own layers, with their share of the weight. 0 is off, whatever the model's "
            "config says (its own router_aux_loss_coef is often 0.001).",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    train_metrics: list[str] | None = field(
        default=None,
        metadata=flag(
            "What training steps measure besides the loss, as TRL logs it: mean_token_accuracy, the share of target "
            "tokens that are the likeliest; entropy, the mean of the predictions', in nats. The last stage makes its "
            "logits once more for that.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=False,
        ),
    )
    train_embeddings: bool = field(
        default=True,
        metadata=flag(
            "Whether the token and position embeddings are trained; false freezes them.",
            on_resume=Resume.MAY_CHANGE,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        check_types(self)
        if self.reconstruction_weight < 0:
            raise LoptError(f"--reconstruction_weight {self.reconstruction_weight}: at least 0")
        if not 0 <= self.label_smoothing_factor < 1:
            raise LoptError(f"--label_smoothing_factor {self.label_smoothing_factor}: at least 0 and below 1")
        if self.label_smoothing_factor and self.loss_type == "dft":
            raise LoptError("--label_smoothing_factor with --loss_type dft: the two are not defined together")
        if unknown := [name for name in self.train_metrics or [] if name not in TOKEN_METRICS]:
            raise LoptError(f"--train_metrics {unknown[0]}: give {' or '.join(TOKEN_METRICS)}, or both")
        if self.router_aux_loss_coef < 0:
            raise LoptError(f"--router_aux_loss_coef {self.router_aux_loss_coef}: at least 0")
        if self.auxiliary_layers < 1:
            raise LoptError(f"--auxiliary_layers {self.auxiliary_layers}: at least 1; --local_objective none has none")
        if (chosen := self.chosen_layers) is not None and list(chosen) != sorted({*chosen} - {0}):
            raise LoptError(f"--auxiliary_choice {self.auxiliary_choice}: layer numbers above 0 that ascend")
        if self.local_head_warmup_steps < 0:
            raise LoptError(f"--local_head_warmup_steps {self.local_head_warmup_steps}: at least 0")
        if self.local_accumulation_steps is not None and self.local_accumulation_steps < 1:
            raise LoptError(
                f"--local_accumulation_steps {self.local_accumulation_steps}: at least 1; with --local_objective none "
                f"a block learns from nothing"
            )
        if self.max_interface_drift is not None and self.max_interface_drift < 0:
            raise LoptError(f"--max_interface_drift {self.max_interface_drift}: at least 0")
        if self.method != "lopt" and self.local_objective not in (_DEFAULT, "none"):
            raise LoptError(
                f"--local_objective {self.local_objective} needs --method lopt; with --method {self.method} no block "
                f"has a local objective"
            )

    def check_accumulation(self, accumulation: int) -> None:
        """Raises LoptError where earlier blocks are to learn from more microbatches than a step has."""
        if self.local_accumulation_steps is not None and self.local_accumulation_steps > accumulation:
            raise LoptError(
                f"--local_accumulation_steps {self.local_accumulation_steps}: a step has "
                f"--gradient_accumulation_steps {accumulation} microbatches; give at most as many"
            )

    def num_learned(self, accumulation: int) -> int:
        """Of so many microbatches of a step, the number that earlier blocks learn from."""
        if self.local == "none":
            return 0
        return min(self.local_accumulation_steps or accumulation, accumulation)

    @property
    def chosen_layers(self) -> tuple[int, ...] | None:
        """The numbers of the auxiliary network's layers, where the flag has numbers."""
        if self.auxiliary_choice in (EVEN, ALL):
            return None
        try:
            return tuple(int(number) for number in self.auxiliary_choice.split(","))
        except ValueError:
            raise LoptError(
                f"--auxiliary_choice {self.auxiliary_choice}: even, all, or layer numbers such as 15,19,24,29"
            ) from None

    @property
    def local(self) -> str:
        """The local objective that is in force; `none` where the blocks before the last have none."""
        return self.local_objective if self.method == "lopt" else "none"
