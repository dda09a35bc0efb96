"""What to train on."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from lopt_pp.config.fields import Resume, check_types, expand_home, flag
from lopt_pp.config.mixture import MixtureEntry, read_entries
from lopt_pp.config.presets import PRESETS
from lopt_pp.config.truncation import Truncation, TruncationMode
from lopt_pp.errors import LoptError

IN_MEMORY = "(in memory)"
"""In place of a file, in the config of a run whose rows its `Trainer` was given as objects."""


PackingStrategy = Literal["bfd", "bfd_split", "wrapped"]
"""How rows are packed; see `DataConfig.packing_strategy`."""


@dataclass(frozen=True)
class DataConfig:
    """The training data and how it is read; each field is an option of the command line.

    Raises:
        LoptError: there is no data or more than one source of it, or flags do not go together.
    """

    _argument_group_name: ClassVar[str] = "Data"

    train_file: list[str] | None = field(
        default=None,
        metadata=flag(
            "Local files with the training rows (.json, .jsonl, .parquet, .csv, .arrow), one or more; patterns "
            "such as `data/*.jsonl`; or directories of such files, or that `datasets` saved to disk. docs/data.md says "
            "which columns a row may have. Give either this or --dataset_name.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=False,
            compared=True,
            is_path=True,
        ),
    )
    dataset_name: str | None = field(
        default=None,
        metadata=flag(
            "Dataset to train on, as `datasets.load_dataset` takes it: a name on the Hugging Face Hub or a "
            "local directory. Its rows have the same columns as those of --train_file.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
            is_path=True,
        ),
    )
    dataset_config: str | None = field(
        default=None,
        metadata=flag(
            "Configuration (subset) of --dataset_name, such as `main`, where it has several.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    dataset_split: str = field(
        default="train",
        metadata=flag(
            "Split of --dataset_name; slices such as `train[:1000]` are understood.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata=flag(
            "Data sets to train on together, as TRL's scripts take them: a list in the YAML file, each with a path, "
            "and if need be name, data_dir, data_files, split, columns, fraction or repeats (docs/data.md). On the "
            "command line, a JSON object each.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=False,
            compared=True,
        ),
    )
    dataset_mapping: str | None = field(
        default=None,
        metadata=flag(
            f"What makes trainable rows of others. A preset ({', '.join(PRESETS)}): its columns, its prompt, "
            "and its dataset on the hub if neither --train_file nor --dataset_name is given. Or a function of yours, "
            "`package.module:function`, from a row as a dict to one with known columns, or to None to leave it out.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    dataset_text_field: str = field(
        default="text",
        metadata=flag(
            "Column of plain text, in rows that have no prompt and no messages.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata=flag(
            "Processes that tokenize, on each node. By default as many as it has cores, if rows are many.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=False,
            compared=True,
        ),
    )
    streaming: bool = field(
        default=False,
        metadata=flag(
            "Tokenize each row when its step comes, instead of all rows before the first step. Rows that "
            "cannot be used are then left out of their step. The order is the same function of the seed.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    chat_template_path: str | None = field(
        default=None,
        metadata=flag(
            "Chat template instead of the tokenizer's: a .jinja file, or a tokenizer's directory or hub id.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
            is_path=True,
        ),
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata=flag(
            "Whether the loss of conversations counts on the assistant's turns only, all of them: by the chat "
            "template's generation marks, or TRL's where it has none, else by what the template adds for a turn. Not "
            "given: so it is. false: on every token.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata=flag(
            "Whether the loss counts on the answer only, of rows with a prompt and an answer. Not given: so it is. "
            "false: on every token.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    allow_no_stop_token: bool = field(
        default=False,
        metadata=flag(
            "Train also on answers that end without a token that ends a turn, so that the model does not learn to "
            "stop. Otherwise such rows are left out, and a chat template that never puts one there is refused.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    max_length: int = field(
        default=1024,
        metadata=flag(
            "Longest row that is trained on, in tokens, and the length of packed rows. Longer rows are left "
            "out and counted, since a cut answer would teach the model not to finish; --packing_strategy may split "
            "them, --truncation_mode cut them.",
            on_resume=Resume.DERIVED,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    truncation_mode: TruncationMode | None = field(
        default=None,
        metadata=flag(
            "Cut rows of more than --max_length tokens instead of leaving them out, as TRL does: keep_start keeps "
            "their first tokens, keep_end the last. Rows without an answer token are left out then.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    packing: bool = field(
        default=False,
        metadata=flag(
            "Put several rows into one of at most --max_length tokens, so that --per_device_train_batch_size "
            "counts packed rows; --packing_strategy says how.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    packing_strategy: PackingStrategy = field(
        default="bfd",
        metadata=flag(
            "How --packing packs, as in TRL. bfd: whole rows, best fit first; attention and positions never cross "
            "from row to row, and longer rows are left out. bfd_split: the same, but longer rows are cut into pieces, "
            "each a row of its own. wrapped: all rows one behind the other, cut every --max_length tokens; attention "
            "and positions run on from row to row.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    padding_free: bool = field(
        default=False,
        metadata=flag(
            "Lay the rows of a microbatch one behind the other without padding. Meant for flash attention; "
            "with sdpa or eager it makes attention over the whole microbatch.",
            on_resume=Resume.NO_EFFECT,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    shuffle_dataset: bool = field(
        default=True,
        metadata=flag(
            "Whether to shuffle the rows anew in each epoch, by the seed. Otherwise the file's order.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )
    train_sampling_strategy: Literal["random", "batch_rebalance", "group_by_length"] = field(
        default="batch_rebalance",
        metadata=flag(
            "batch_rebalance: each step takes random rows, and makes microbatches of similar length of them. "
            "random: microbatches as the rows come. group_by_length: microbatches of similar length from among many "
            "steps' rows: the least padding, but rows of a step resemble each other.",
            on_resume=Resume.MUST_MATCH,
            shared_by_ranks=True,
            compared=True,
        ),
    )

    def __post_init__(self) -> None:
        if isinstance(self.train_file, str):  # From a YAML file, or Python.
            object.__setattr__(self, "train_file", [self.train_file])
        if self.train_file in (["None"], ["null"]):  # What a script writes for what it does not give.
            object.__setattr__(self, "train_file", None)
        expand_home(self)
        check_types(self)
        if not (self.train_file or self.dataset_name or self.datasets) and self.dataset_mapping in PRESETS:
            preset = PRESETS[self.dataset_mapping]
            object.__setattr__(self, "dataset_name", preset.name)
            object.__setattr__(self, "dataset_config", self.dataset_config or preset.config)
        sources = [name for name in ("train_file", "dataset_name", "datasets") if getattr(self, name)]
        if not sources:
            raise LoptError("give exactly one of --train_file and --dataset_name; neither is given, nor are datasets")
        if len(sources) > 1:
            said = "; both are given" if "datasets" not in sources else f", not datasets and {sources[0]}"
            raise LoptError(f"give exactly one of --train_file and --dataset_name{said}")
        read_entries(self.datasets or ())
        if self.max_length < 2:
            raise LoptError(
                f"--max_length is {self.max_length}; give at least 2: the first token of a row is never predicted"
            )
        if self.dataset_num_proc is not None and self.dataset_num_proc < 1:
            raise LoptError(f"--dataset_num_proc {self.dataset_num_proc}: at least 1")
        if self.train_sampling_strategy == "group_by_length":
            if self.streaming:
                raise LoptError(
                    "--train_sampling_strategy group_by_length needs the lengths of all rows, which --streaming leaves "
                    "unknown; leave out one of them"
                )
            if not self.shuffle_dataset:
                raise LoptError(
                    "--train_sampling_strategy group_by_length orders the rows anew, which --shuffle_dataset false "
                    "forbids; leave out one of them"
                )

    @property
    def mixture(self) -> tuple[MixtureEntry, ...]:
        """The entries of `datasets`; none where that is not given."""
        return read_entries(self.datasets or ())

    @property
    def packs_rows(self) -> bool:
        """Whether rows share a sequence of a microbatch, and the model has to keep them apart."""
        return self.padding_free or (self.packing and self.packing_strategy != "wrapped")

    @property
    def splits_rows(self) -> bool:
        """Whether rows of more than `max_length` tokens are split, and not left out."""
        return self.packing and self.packing_strategy != "bfd"

    @property
    def truncation(self) -> Truncation | None:
        """What rows are cut to; None where they are not."""
        if self.truncation_mode is None or self.splits_rows:
            return None
        return Truncation(self.max_length, self.truncation_mode)
