"""Flags of an evaluation that are out of range, or do not go together."""

import pytest

from lopt_pp.config.parser import parse_config
from lopt_pp.errors import LoptError


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("--eval_steps -1", "^--eval_steps -1: at least 0$"),
        ("--per_device_eval_batch_size 0", "^--per_device_eval_batch_size 0: at least 1$"),
        ("--eval_split_size 0", "^--eval_split_size 0: a number of rows such as 100, or a share"),
        ("--eval_split_size -3", "^--eval_split_size -3: a number of rows"),
        ("--eval_split_size 1.5", "^--eval_split_size 1.5: a number of rows"),
        ("--eval_file a --eval_split_size 3", "^give one of --eval_file and --eval_split_size:"),
        ("--eval_file a b", "^--eval_file a: with several files each has a name .*: easy=a$"),
        ("--eval_file a=b ./c=d", "^--eval_file ./c=d: with several files each has a name .*: easy=./c=d$"),
        ("--eval_file a=b a=c", "^--eval_file: two of the files have the name a$"),
        ("--eval_file a=b c=", "^--eval_file c=: it names no file; give c=FILE"),
        ("--eval_file=", "^--eval_file '': expected a string that is not empty"),
        ("--metric_for_best_model loss", "^--metric_for_best_model needs rows to evaluate on: give --eval_file, "),
        ("--early_stopping_patience 3", "^--early_stopping_patience needs rows to evaluate on: give --eval_file, "),
        ("--eval_file a --early_stopping_patience 0", "^--early_stopping_patience 0: at least 1$"),
        ("--eval_file a --early_stopping_patience 1 --eval_steps 0", "^--early_stopping_patience needs.*above 0$"),
        ("--eval_file a --early_stopping_threshold -1", "^--early_stopping_threshold -1: at least 0$"),
        ("--eval_metrics entropy", "^--eval_metrics needs rows to evaluate on: give --eval_file, "),
        ("--load_best_model_at_end", "^--load_best_model_at_end needs rows to compare models on: give --eval_file$"),
        ("--eval_delay -1", "^--eval_delay -1: at least 0$"),
        ("--eval_file a --load_best_model_at_end --eval_strategy epoch", "^--load_best.* they are epoch and steps$"),
        ("--eval_file a --load_best_model_at_end --save_steps 0", "^--load_best_model_at_end.*are 0 and 500$"),
        ("--eval_file a --load_best_model_at_end --eval_steps 0", "^--load_best_model_at_end.*are 500 and 0$"),
        ("--eval_file a --load_best_model_at_end --eval_steps 300", "^--load_best.*multiple.*are 500 and 300$"),
    ],
)
def test_unusable_flags(given: str, error: str) -> None:
    required = "--model_name_or_path a-model --train_file rows.jsonl --output_dir out"
    with pytest.raises(LoptError, match=error):
        parse_config([*required.split(), *given.split()])
