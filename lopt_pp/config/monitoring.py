"""What a run reports besides its records."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.errors import LoptError


@dataclass(frozen=True)
class ReportConfig:
    """What a run tells about itself, and where."""

    _argument_group_name: ClassVar[str] = "Insight"

    report_to: Literal["none", "tensorboard", "wandb"] = field(
        default="none",
        metadata=flag(
            "Where the metrics of all stages go, as one run, besides metrics.jsonl: TensorBoard or Weights & "
            "Biases. Needs that package (pip install 'lopt-pp[insight]' brings TensorBoard) where rank 0 runs.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    logging_dir: str | None = field(
        default=None,
        metadata=flag(
            "Directory of the tracker's own files; by default OUTPUT_DIR/runs.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
            is_path=True,
        ),
    )
    run_name: str | None = field(
        default=None,
        metadata=flag(
            "Name of the run for trackers and reports; by default that of --output_dir.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    trace: str | None = field(
        default=None,
        metadata=flag(
            "Steps whose timeline goes to OUTPUT_DIR/trace.json, for Perfetto or chrome://tracing: the first "
            "and the last, such as 11-14. A row per stage, on one clock.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=False,
        ),
    )
    probe_steps: int = field(
        default=50,
        metadata=flag(
            "Steps between measurements of how far the hidden states at each boundary have drifted from the "
            "pretrained model's, on a few fixed rows; 0 is off. Changes no result. One costs a forward of at most a "
            "microbatch: less than a hundredth of the time at the default.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        expand_home(self)
        check_types(self)
        _ = self.trace_window
        if self.probe_steps < 0:
            raise LoptError(f"--probe_steps {self.probe_steps}: at least 0")

    @property
    def trace_window(self) -> range:
        """The steps to trace, counted from 1; empty where none are."""
        if self.trace is None:
            return range(0)
        match = re.fullmatch(r"(\d+)-(\d+)", self.trace)
        first, last = map(int, match.groups()) if match else (0, 0)
        if not 1 <= first <= last:
            raise LoptError(f"--trace {self.trace}: the first and the last step, counted from 1, such as 11-14")
        return range(first, last + 1)
