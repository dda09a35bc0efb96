"""What each way of training learns and what it forgets: one table, a JSON file and a plot.

    python -m benchmarks.quality [--form tiny|cpu|gpu] [--model DIRECTORY] [--folder quality]

Methods: end to end, frozen (only the last block learns), local learning by each objective, and the untouched model.
Each is trained at every learning rate of one grid, the same for all; the rates with the lowest loss on the validation
rows are then trained with more seeds, and measured on test questions that no choice has seen. Then once more with as
many steps as fit the wall time that end-to-end training takes on the same two processes, by PyTorch's 1F1B or by one
that does not pad all microbatches of a step alike, whichever is faster.

Without files of your own the task is a mix of questions from reasoning-gym whose answers can be checked; with
--questions word_problems MetaMathQA, tested on GSM8K, from the Hugging Face Hub. What is to be kept is measured on the
texts beside this benchmark. --train_file, --validation_file and --eval_file take other rows (then by answer loss
alone), --general_file and --instructions_file other texts, --tasks benchmarks of lm-evaluation-harness besides.

What is done is kept in --folder and is not done again: start the same command once more to go on. --minutes stops it in
good order after so long, with the table of what there is. Forms:

  tiny  a random model of four layers, for tests: the machinery only, the figures mean nothing.
  cpu   SmolLM2-135M-Instruct (--model, from launch/quickstart.sh) on two cores, within three hours.
  gpu   any model, bfloat16; as many trials side by side as there are GPUs.
"""

import argparse
import hashlib
import importlib.util
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.helpers.chat_model import write_chat_model
from benchmarks.helpers.machine import describe_machine, one_line
from benchmarks.quality.comparison import GRID_SEED, Comparison, OutOfTime
from benchmarks.quality.forms import FORMS, Form
from benchmarks.quality.methods import METHODS, UNTOUCHED
from benchmarks.quality.plot import plot
from benchmarks.quality.questions import Question, as_json, as_rows
from benchmarks.quality.reasoning_tasks import draw
from benchmarks.quality.runs import Setup, TrialFailed, keep, kept
from benchmarks.quality.summary import closed, grid_table, speed_table, table
from benchmarks.quality.word_problems import TESTED_ON, TRAINED_ON, UnknownRows, load

TEXTS = Path(__file__).parent / "texts"


class OtherSettings(Exception):
    """The folder has results of something else; the message says of what."""


def prepare(flags: argparse.Namespace, form: Form) -> Setup:
    """Writes the rows, unless there are rows of the user's.

    Raises:
        OtherSettings: results that are there already are of other rows, another model or other flags.
        UnknownRows: a dataset cannot be had, or is not of word problems.
    """
    folder: Path = flags.folder
    written: dict[Path, str] = {}
    files = {"train": flags.train_file, "validation": flags.validation_file, "test": flags.eval_file}
    questions = None
    if flags.train_file is None:
        drawn = _questions(flags, {split: getattr(form, split) for split in files})
        files = {split: folder / f"{split}.jsonl" for split in files}
        written = {path: as_rows(drawn[split]) for split, path in files.items()}
        questions = folder / "questions.json"
        written[questions] = as_json(drawn["test"])
    setup = Setup(
        folder=folder,
        model=folder / "random" if flags.form == "tiny" else flags.model,
        **files,
        questions=questions,
        general=flags.general_file,
        instructions=flags.instructions_file,
        form=form,
        flags=tuple(flags.flags),
        device=flags.device,
        tasks=tuple(flags.tasks),
        include_path=flags.include_path,
        limit=flags.limit,
        method_flags=dict(flags.method_flags),
    )
    _check_same(setup, written)
    (folder / "models").mkdir(exist_ok=True)
    for path, text in written.items():
        path.write_text(text, encoding="utf-8")
    if flags.form == "tiny" and not setup.model.exists():
        torch.manual_seed(0)
        write_chat_model(setup.model, [*written.values(), setup.general.read_text(encoding="utf-8")])
    return setup


def _questions(flags: argparse.Namespace, numbers: Mapping[str, int]) -> Mapping[str, Sequence[Question]]:
    """By split."""
    if flags.questions == "word_problems":
        return load(flags.dataset_name or TRAINED_ON, flags.eval_dataset_name or TESTED_ON, numbers)
    return draw(numbers)


def _check_same(setup: Setup, written: Mapping[Path, str]) -> None:
    """Sees that what is in the folder was made with the same; what may be changed under way, is not looked at."""
    facts: dict[str, Any] = {"--model": str(setup.model.resolve()), "--flags": list(setup.flags)}
    for name in ("train", "validation", "test", "general", "instructions"):
        path = getattr(setup, name)
        content = written[path].encode() if path in written else path.read_bytes()
        facts[f"the rows of {name}"] = hashlib.sha256(content).hexdigest()
    size = asdict(setup.form)
    facts |= {
        name: size[name] for name in ("kept_rows", "max_length", "batch", "accumulation", "head_rate", "head_warmup")
    }
    facts["the form's flags"] = list(setup.form.flags)
    facts |= {"--tasks": list(setup.tasks), "--limit": setup.limit}
    facts["--method_flags"] = {method: list(own) for method, own in setup.method_flags.items()}
    path = setup.folder / "settings.json"
    setup.folder.mkdir(parents=True, exist_ok=True)
    if (before := kept(path)) is None:
        keep(path, facts)
    elif others := [name for name in facts if before.get(name) != facts[name]]:
        raise OtherSettings(
            f"{setup.folder} has results with other values of {', '.join(others)}; give another --folder"
        )


def report(comparison: Comparison, flags: argparse.Namespace, form: Form, machine: dict[str, Any]) -> str:
    """Writes the JSON file and the plot; returns the tables."""
    equal_steps, equal_time = comparison.equal_steps_lines, comparison.equal_time_lines
    parts = []
    if comparison.speeds:
        parts += ["What a step costs:", speed_table(comparison.speeds)]
    if comparison.results:
        parts += [f"The grid, seed {GRID_SEED}:", grid_table(comparison.results, form.steps, GRID_SEED)]
        plot(flags.folder / "quality.png", comparison.results, comparison.untouched, form.steps, GRID_SEED)
    if comparison.best:
        parts += [f"At equal steps ({form.steps}), each at its best rates:", table(equal_steps)]
        for method in comparison.best:
            if method not in ("e2e", "frozen") and (share := closed(equal_steps, method)) is not None:
                parts.append(f"{method} closes {share:.0%} of the distance in answer loss from frozen to e2e.")
    if equal_time:
        parts += ["At the wall time that end-to-end training takes for as many steps:", table(equal_time)]
    content = {
        "machine": machine,
        "form": {"name": flags.form, **asdict(form)},
        "speeds": comparison.speeds,
        UNTOUCHED: comparison.untouched,
        "trials": list(comparison.results.values()),
        "best": comparison.best,
        "equal_steps": [asdict(line) for line in equal_steps],
        "equal_time": [asdict(line) for line in equal_time],
    }
    keep(flags.folder / "quality.json", content)
    return "\n\n".join([*parts, one_line(machine)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--model", type=_there, help="directory of the untouched model")
    parser.add_argument("--folder", type=Path, default=Path("quality"), help="for results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start nothing new after so long")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    parser.add_argument(
        "--questions",
        choices=["reasoning_gym", "word_problems"],
        help="what is learned, unless there are files of rows (default: reasoning_gym)",
    )
    parser.add_argument("--dataset_name", help=f"or directory, of word problems to train on (default: {TRAINED_ON})")
    parser.add_argument("--eval_dataset_name", help=f"likewise, to test on (default: {TESTED_ON})")
    parser.add_argument("--train_file", type=_there, help="rows to train on, instead of questions")
    parser.add_argument("--validation_file", type=_there, help="rows to choose the rates by")
    parser.add_argument("--eval_file", type=_there, help="rows to measure on")
    parser.add_argument("--general_file", type=_there, default=TEXTS / "general.jsonl", help="text that is to be kept")
    parser.add_argument(
        "--instructions_file", type=_there, default=TEXTS / "instructions.jsonl", help="conversations likewise"
    )
    parser.add_argument(
        "--tasks", nargs="+", default=[], help="benchmarks of lm-evaluation-harness, where it and their data can be had"
    )
    parser.add_argument("--include_path", type=_there, help="directory with benchmarks of your own")
    parser.add_argument("--limit", type=float, help="items of each benchmark, or a share of them below 1")
    parser.add_argument("--rates", type=float, nargs="+", help="another grid of learning rates")
    parser.add_argument("--local_shares", type=float, nargs="+", help="of them that the earlier blocks are tried at")
    parser.add_argument("--head_rate", type=float, help="of local heads, as a multiple of the last block's")
    parser.add_argument("--head_warmup", type=float, help="share of the steps in which local heads learn alone")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--accumulation", type=int, help="another number of microbatches in a step")
    parser.add_argument("--max_length", type=int, help="of a row in tokens, instead of the form's")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: of the form)")
    parser.add_argument(
        "--method_flags",
        type=_method_flags,
        action="append",
        default=[],
        metavar="METHOD=FLAGS",
        help="further flags of the runs of one method, such as 'e2e=--split 18'; may be given for each",
    )
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of every run; come last")
    flags = parser.parse_args(arguments)
    if flags.form != "tiny" and flags.model is None:
        parser.error(f"--form {flags.form} needs --model; launch/quickstart.sh gets one")
    given = [flags.train_file, flags.validation_file, flags.eval_file]
    if any(given) and not all(given):
        parser.error("--train_file, --validation_file and --eval_file go together")
    if any(given) and flags.questions:
        parser.error("--questions and --train_file are two answers to what is learned: give one")
    if flags.questions != "word_problems" and (flags.dataset_name or flags.eval_dataset_name):
        parser.error("--dataset_name and --eval_dataset_name go with --questions word_problems")
    if flags.tasks and importlib.util.find_spec("lm_eval") is None:
        parser.error("--tasks needs lm-evaluation-harness: pip install -c constraints.txt '.[evaluate]'")
    flags.device = flags.device or ("cuda" if flags.form == "gpu" else "cpu")
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    return flags


def _there(name: str) -> Path:
    if not (path := Path(name)).exists():
        raise argparse.ArgumentTypeError(f"{name} is not there")
    return path


def _method_flags(text: str) -> tuple[str, tuple[str, ...]]:
    method, _, flags = text.partition("=")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{text}: METHOD=FLAGS, where METHOD is one of {', '.join(METHODS)}")
    return method, tuple(shlex.split(flags))


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    form = FORMS[flags.form]
    names = ("rates", "local_shares", "head_rate", "head_warmup", "steps", "accumulation", "max_length")
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    changed: dict[str, Any] = {name: tuple(own) if isinstance(own, list) else own for name, own in given.items()}
    form = replace(form, **changed)
    machine = describe_machine(torch.device(flags.device))
    devices = torch.cuda.device_count() if flags.device == "cuda" else 2
    try:
        setup = prepare(flags, form)
    except (OtherSettings, UnknownRows) as error:
        print(f"benchmarks/quality: {error}", file=sys.stderr)
        return 1
    comparison = Comparison(setup, form, flags.methods, devices, min(2, devices), flags.minutes)
    status = 0
    try:
        comparison.run()
    except OutOfTime:
        print("The time is over: the same command goes on from here.", file=sys.stderr)
    except TrialFailed as error:
        print(error, file=sys.stderr)
        status = 1
    print(report(comparison, flags, form, machine))
    return status


if __name__ == "__main__":
    sys.exit(main())
