"""What to train on."""

from dataclasses import dataclass, field
from typing import ClassVar

from lopt_pp.errors import LoptError
from lopt_pp.flags import check_types


@dataclass(frozen=True)
class DataConfig:
    """The training data and how it is read; each field is an option of the command line.

    Raises:
        LoptError: not exactly one of `train_file` and `dataset_name` is given, or `max_length` is below 2.
    """

    _argument_group_name: ClassVar[str] = "Data"

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Local file with the training rows: .json, .jsonl, .parquet or .csv. A row has one of these sets "
            "of columns: `input_ids` and `labels`; `messages`; `prompt` and `completion`; `question` and `answer`; "
            "`instruction`, `output` and optionally `input`; `text`. Where a row has a prompt, the loss counts on the "
            "answer only. Give either this or --dataset_name."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset to train on, as `datasets.load_dataset` takes it: a name on the Hugging Face Hub or a "
            "local directory. Its rows have the same columns as those of --train_file."
        },
    )
    dataset_config: str | None = field(
        default=None,
        metadata={"help": "Configuration (subset) of --dataset_name, such as `main`, where it has several."},
    )
    dataset_split: str = field(
        default="train",
        metadata={"help": "Split of --dataset_name; slices such as `train[:1000]` are understood."},
    )
    max_length: int = field(
        default=1024,
        metadata={
            "help": "Longest row that is trained on, in tokens. Longer rows are left out and counted, never cut: a cut "
            "answer would teach the model not to finish."
        },
    )
    shuffle_dataset: bool = field(
        default=True,
        metadata={"help": "Whether to shuffle the rows anew in each epoch, by the seed. Otherwise the file's order."},
    )

    def __post_init__(self) -> None:
        check_types(self)
        if (self.train_file is None) == (self.dataset_name is None):
            given = "neither" if self.train_file is None else "both"
            raise LoptError(f"give exactly one of --train_file and --dataset_name; {given} is given")
        if self.max_length < 2:
            raise LoptError(
                f"--max_length is {self.max_length}; give at least 2: the first token of a row is never predicted"
            )
