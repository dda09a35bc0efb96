"""`lopt-pp evaluate MODEL --before BASE ...`: what was learned and what was kept, before and after, in one table.

Rows of a file are measured by their loss and perplexity, those of what is to be kept also by how far the model's
predictions have moved from BASE's. Benchmarks are run by lm-evaluation-harness, where it is installed.
"""

import argparse
import json
from collections.abc import Sequence
from os.path import expanduser
from typing import get_args

from lopt_pp.checkpoint.named import check_model_or_checkpoint
from lopt_pp.commands.common import CommandParser, add_common, be_quiet, device_and_dtype, home_path, say
from lopt_pp.config.truncation import TruncationMode
from lopt_pp.data.files import find_files
from lopt_pp.errors import LoptError, renamed_in_errors
from lopt_pp.util.files import write_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = _parser()
    given = parser.read(arguments)
    given.tasks, given.general_tasks = _names(given.tasks), _names(given.general_tasks)
    has_files = given.eval_file is not None or given.general_eval_file is not None
    if not (has_files or given.tasks or given.general_tasks):
        parser.error("nothing to measure: give --eval_file, --general_eval_file, --tasks or --general_tasks")
    if given.limit is not None and given.limit <= 0:
        parser.error("--limit: a number of items, or a share of them below 1")
    if given.divergence and (given.before is None or given.general_eval_file is None):
        parser.error("--divergence needs a model to diverge from, and text: give --before and --general_eval_file")
    print(_run(given))
    return 0


def _parser() -> CommandParser:
    parser = CommandParser("lopt-pp evaluate", description=__doc__)
    parser.add_argument(
        "models", type=expanduser, nargs="+", metavar="MODEL", help="directory or hub id of a model, or a checkpoint"
    )
    parser.add_argument("--before", type=expanduser, metavar="BASE", help="the pretrained model, to compare with")
    parser.add_argument(
        "--eval_file", type=expanduser, metavar="FILE", help="rows of the task, of the same kinds as --train_file's"
    )
    parser.add_argument(
        "--general_eval_file", type=expanduser, metavar="FILE", help="rows of what is to be kept, such as plain text"
    )
    parser.add_argument(
        "--divergence",
        action="store_true",
        help="also measure how far the predictions on --general_eval_file have moved from BASE's: the mean KL "
        "divergence of the next-token distribution. Two models are in memory then",
    )
    parser.add_argument("--tasks", default="", metavar="NAMES", help="benchmarks of the task, such as gsm8k,math")
    parser.add_argument("--general_tasks", default="", metavar="NAMES", help="benchmarks of what is to be kept")
    parser.add_argument("--limit", type=float, help="items of each benchmark and file, or a share of them below 1")
    parser.add_argument("--num_fewshot", type=int, help="examples before each item of a benchmark")
    parser.add_argument("--batch_size", default="8", help="sequences at once in benchmarks, or auto (default: 8)")
    parser.add_argument("--apply_chat_template", action="store_true", help="give the items of benchmarks as a chat")
    parser.add_argument(
        "--include_path", type=expanduser, metavar="DIR", help="directory with benchmarks of your own, for lm_eval"
    )
    parser.add_argument("--max_length", type=int, default=1024, help="longest row of a file in tokens (default: 1024)")
    parser.add_argument(
        "--truncation_mode",
        choices=get_args(TruncationMode),
        help="cut longer rows, as the run was told: keep_start keeps their first tokens, keep_end the last (default: "
        "they are left out)",
    )
    parser.add_argument("--output_path", type=home_path, metavar="FILE", help="JSON file for the numbers")
    add_common(parser)
    return parser


def _names(given: str) -> list[str]:
    return [name.strip() for name in given.split(",") if name.strip()]


def _check_names(given: argparse.Namespace) -> None:
    """Sees that there is what the flags name, before PyTorch is loaded and models are measured.

    Raises:
        LoptError: something of it is not there, or the numbers could not be written.
    """
    for name in filter(None, [given.before, *given.models]):
        check_model_or_checkpoint(name)
    for flag, file in {"--eval_file": given.eval_file, "--general_eval_file": given.general_eval_file}.items():
        with renamed_in_errors("--train_file", flag):
            list(find_files([file] if file is not None else []))
    if (path := given.output_path) is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        reason = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise LoptError(f"--output_path {path} cannot be written: {reason}")


def _run(given: argparse.Namespace) -> str:
    """Measures every model and writes the file for the numbers; returns the table."""
    _check_names(given)
    say()
    from lopt_pp.checkpoint.export import ordinary_model
    from lopt_pp.evaluation.files import EvalFile, measure_on, open_model
    from lopt_pp.evaluation.lm_eval_harness import Benchmarks, check_installed, run_benchmarks
    from lopt_pp.evaluation.scores import Measure, Score, Scores, as_data, table
    from lopt_pp.model.block import BlockModel

    be_quiet()
    files, rows = [], (given.max_length, given.truncation_mode, given.limit)
    if given.eval_file is not None:
        files.append(EvalFile("task", "--eval_file", given.eval_file, *rows))
    if given.general_eval_file is not None:
        files.append(EvalFile("general", "--general_eval_file", given.general_eval_file, *rows))
    how = given.limit, given.num_fewshot, given.batch_size, given.apply_chat_template, given.include_path
    benchmarks = Benchmarks(given.tasks, given.general_tasks, *how)
    has_benchmarks = bool(given.tasks or given.general_tasks)
    if has_benchmarks:  # Before the models are loaded, which may take minutes.
        check_installed()
    device, dtype = device_and_dtype(given)
    # One model after the other, BASE first, so that no more than one is in memory, or two with --divergence.
    measured: list[tuple[str, Scores]] = []
    base: BlockModel | None = None
    for name in [given.before, *given.models] if given.before is not None else given.models:
        say(f"measuring {name}")
        scores: dict[Measure, Score] = {}
        with ordinary_model(name, given.trust_remote_code) as path:
            if files:
                block, tokenizer = open_model(path, name, device, dtype, given.trust_remote_code)
                for file in files:
                    scores |= measure_on(file, block, tokenizer, device, name, base)
                if given.divergence and base is None:
                    base = block
                del block  # One that is done with makes room for the next.
            if has_benchmarks:
                with renamed_in_errors(path, name):
                    scores |= run_benchmarks(path, benchmarks, device, dtype, given.trust_remote_code)
        measured.append((name, scores))
    before = measured.pop(0) if given.before is not None else None
    if given.output_path is not None:
        content = {"limit": given.limit, "measures": as_data(measured, before)}
        try:
            write_text(given.output_path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise LoptError(f"--output_path {given.output_path} cannot be written: {error.strerror}") from error
    return table(measured, before)
