"""What a run reports besides its records."""

import re
from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.errors import LoptError, shown

TRACKERS = (
    "none",
    "all",
    "tensorboard",
    "wandb",
    "trackio",
    "mlflow",
    "comet_ml",
    "swanlab",
    "azure_ml",
    "clearml",
    "codecarbon",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "neptune",
)
"""What `--report_to` takes: the names of transformers."""


@dataclass(frozen=True)
class ReportConfig:
    """What a run tells about itself, and where."""

    _argument_group_name: ClassVar[str] = "Insight"

    report_to: list[str] | None = field(
        default=None,
        metadata=flag(
            "Trackers that get the metrics of all stages, as one run, besides metrics.jsonl: one or several of "
            "tensorboard, wandb, trackio, mlflow, comet_ml, swanlab and the others of transformers; all: those that "
            "are installed; none, as by default. Each needs its package where rank 0 runs (pip install "
            "'lopt-pp[insight]' brings TensorBoard).",
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
    project: str | None = field(
        default=None,
        metadata=flag(
            "Name of the project, or experiment, of the trackers; by default what their environment variables say "
            "(WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME, ...), else their own default.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    trackio_space_id: str | None = field(
        default=None,
        metadata=flag(
            "With --report_to trackio: the Space of the hub that shows the run, such as me/runs; by default it stays "
            "on this machine.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    trackio_bucket_id: str | None = field(
        default=None,
        metadata=flag(
            "With --trackio_space_id: the bucket of the hub that keeps the data.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    trackio_static_space_id: str | None = field(
        default=None,
        metadata=flag(
            "With --trackio_space_id: the static Space that is left of it after the run.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=False,
        ),
    )
    disable_tqdm: bool = field(
        default=False,
        metadata=flag(
            "No progress bar, on a terminal either.",
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
    profile_steps: str | None = field(
        default=None,
        metadata=flag(
            "Steps that PyTorch's profiler records, the first and the last, such as 11-14: OUTPUT_DIR/profile has a "
            "trace of each process with every operator, and on GPUs every kernel and what memory was given out. Slows "
            "these steps down.",
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
        if isinstance(self.report_to, str):
            object.__setattr__(self, "report_to", [self.report_to])
        expand_home(self)
        check_types(self)
        for name in self.report_to or []:
            if name not in TRACKERS:
                raise LoptError(f"--report_to {shown(name)}: expected one or several of {', '.join(TRACKERS)}")
        if len(self.report_to or []) > 1 and {"all", "none"} & set(self.report_to or []):
            raise LoptError("--report_to: all and none stand alone")
        _ = self.windows
        if self.probe_steps < 0:
            raise LoptError(f"--probe_steps {self.probe_steps}: at least 0")

    @property
    def trace_window(self) -> range:
        """The steps to trace, counted from 1; empty where none are."""
        return _window("trace", self.trace)

    @property
    def profile_window(self) -> range:
        """The steps to profile, counted from 1; empty where none are."""
        return _window("profile_steps", self.profile_steps)

    @property
    def windows(self) -> dict[str, range]:
        """Of each flag that names steps, and is given, these."""
        windows = {"trace": self.trace_window, "profile_steps": self.profile_window}
        return {name: window for name, window in windows.items() if window}


def _window(flag: str, given: str | None) -> range:
    if given is None:
        return range(0)
    match = re.fullmatch(r"(\d+)-(\d+)", given)
    first, last = map(int, match.groups()) if match else (0, 0)
    if not 1 <= first <= last:
        raise LoptError(f"--{flag} {given}: the first and the last step, counted from 1, such as 11-14")
    return range(first, last + 1)
