"""What each way of training learns and what it forgets: one table, a JSON file and a plot.

    python benchmarks/quality [--form tiny|cpu|gpu] [--model DIRECTORY] [--folder quality]

Methods: end to end, frozen (only the last block learns), local learning by each objective, and the untouched model.
Each is trained at every learning rate of one grid, the same for all; the rates with the lowest loss on the validation
rows are then trained with more seeds, and measured on test questions that no choice has seen. Then once more with as
many steps as fit the wall time that end-to-end training takes on the same two processes.

Without files of your own the task is a mix of questions from reasoning-gym whose answers can be checked; what is to be
kept is measured on the texts beside this benchmark. --train_file, --validation_file and --eval_file take other rows
(then by answer loss alone), --general_file and --instructions_file other texts.

What is done stands in --folder and is not done again: start the same command once more to go on. --minutes stops it in
good order after so long, with the table of what there is. Forms:

  tiny  a random model of four layers, for tests: the machinery only, the figures mean nothing.
  cpu   SmolLM2-135M-Instruct (--model, from launch/quickstart.sh) on two cores, within three hours.
  gpu   any model, bfloat16; as many trials side by side as there are GPUs.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before PyTorch, for this process and those that it starts.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# This folder runs as a program; what describes the machine is beside it.
BENCHMARKS = Path(__file__).resolve().parents[1]
sys.path.append(str(BENCHMARKS))

# ruff: noqa: E402
import torch
from machine import describe_machine, one_line
from methods import METHODS, UNTOUCHED, Trial, grid
from runs import Ground, TrialFailed, measure_untouched, train_and_measure
from speed import measure_speed
from summary import Line, Setting, best_settings, closed, grid_table, lines_of, plot, speed_table, table, untouched_line
from tasks import draw, write_rows

TEXTS = BENCHMARKS / "texts"


@dataclass(frozen=True)
class Form:
    """The size of a comparison.

    Attributes:
        steps: of the optimizer in a trial.
        rates: the grid's learning rates.
        seeds: of the chosen settings.
        test, validation: numbers of questions.
        kept_rows: of each text that is to be kept.
        flags: of the program for every run.
        timed_steps: of the measurement of speed.
    """

    steps: int
    rates: tuple[float, ...]
    seeds: int
    test: int
    validation: int
    kept_rows: int
    flags: tuple[str, ...]
    timed_steps: int


_SCHEDULE = ("--lr_scheduler_type", "linear", "--warmup_ratio", "0.1")

FORMS = {
    "tiny": Form(3, (1e-2,), 1, 12, 6, 4, ("--per_device_train_batch_size", "2", *_SCHEDULE), 2),
    "cpu": Form(
        50,
        (5e-5, 1e-4, 2e-4),
        3,
        120,
        60,
        20,
        ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", *_SCHEDULE),
        8,
    ),
    "gpu": Form(
        400,
        (5e-6, 1e-5, 2e-5, 5e-5, 1e-4),
        3,
        1200,
        300,
        1000,
        (
            *("--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "4"),
            *("--dtype", "bfloat16", *_SCHEDULE),
        ),
        20,
    ),
}
HEAD_WARMUP = 0.25
"""Share of the steps in which local heads learn alone."""


class OutOfTime(Exception):
    """The time that was given is over."""


class Comparison:
    """The trials of one folder, in the order that makes the most of being cut short.

    Args:
        flags: of the command.
        ground: what all trials share.
        form: their number and size.
    """

    def __init__(self, flags: argparse.Namespace, ground: Ground, form: Form) -> None:
        self._flags, self._ground, self._form = flags, ground, form
        self._deadline = time.monotonic() + 60 * flags.minutes if flags.minutes else None
        self.results: dict[Trial, dict[str, Any]] = {}
        self.speeds: dict[str, dict[str, Any]] = {}
        self.untouched: dict[str, Any] = {}
        self.best: dict[str, Setting] = {}
        self.equal_time: dict[str, int] = {}

    def run(self) -> None:
        """All of it.

        Raises:
            OutOfTime: it is to be gone on with later.
            TrialFailed: a process failed.
        """
        form, flags, methods = self._form, self._flags, self._flags.methods
        self.untouched = measure_untouched(self._ground)
        self._train(grid(methods, form.rates, seed=1, steps=form.steps))
        self.best = best_settings(self.results, form.steps)
        seeds = range(1, form.seeds + 1)
        self._train([Trial(*setting, seed, form.steps) for seed in seeds for setting in self.best.values()])
        for method in methods:
            self.speeds[method] = measure_speed(
                self._ground, method, form.rates[0], form.timed_steps, flags.pipeline_processes, self._check_time
            )
            self._say(f"{method}: {self.speeds[method]['step_seconds']:.2f} s per step")
        if "e2e" in self.speeds:
            given = form.steps * self.speeds["e2e"]["step_seconds"]
            self.equal_time = {method: max(1, round(given / self.speeds[method]["step_seconds"])) for method in methods}
            self._train(
                [Trial(*own, seed, self.equal_time[method]) for seed in seeds for method, own in self.best.items()]
            )

    def _train(self, trials: Sequence[Trial]) -> None:
        train_and_measure(self._ground, trials, self._flags.side_by_side, self._check_time, self._note)

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        if trial not in self.results:
            self._say(f"{trial.name}: validation loss {result['validation_loss']:.4f}")
        self.results[trial] = result

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime

    def _say(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def lines(self) -> tuple[list[Line], list[Line]]:
        """Of the tables at equal steps and at equal wall time."""
        first = [untouched_line(self.untouched)] if self.untouched else []
        equal = lines_of(self.results, self.best, dict.fromkeys(self.best, self._form.steps))
        return [*first, *equal], lines_of(self.results, self.best, self.equal_time) if self.equal_time else []


def prepare(flags: argparse.Namespace, form: Form) -> Ground:
    """Writes the rows, unless there are rows of the user's."""
    folder: Path = flags.folder
    (folder / "models").mkdir(parents=True, exist_ok=True)
    files = {"train": flags.train_file, "validation": flags.validation_file, "test": flags.eval_file}
    questions = None
    if flags.train_file is None:
        # As many rows as no trial at equal wall time comes to the end of.
        size = 4 * form.steps * _rows_of_step(form)
        drawn = draw({"train": size, "validation": form.validation, "test": form.test})
        files = {split: folder / f"{split}.jsonl" for split in drawn}
        for split, path in files.items():
            write_rows(path, drawn[split])
        questions = folder / "questions.json"
        questions.write_text(json.dumps([asdict(question) for question in drawn["test"]]))
    model = flags.model
    if flags.form == "tiny":
        model = folder / "random"
        write_random_model(model)
    return Ground(
        folder=folder,
        model=model,
        **files,
        questions=questions,
        general=flags.general_file,
        instructions=flags.instructions_file,
        flags=(*form.flags, *flags.flags),
        head_warmup=HEAD_WARMUP,
        probe_steps=max(1, form.steps // 4),
        device=flags.device,
        max_length=flags.max_length,
        kept_rows=form.kept_rows,
    )


def _rows_of_step(form: Form) -> int:
    rows = 1
    for flag in ("--per_device_train_batch_size", "--gradient_accumulation_steps"):
        if flag in form.flags:
            rows *= int(form.flags[form.flags.index(flag) + 1])
    return rows


def write_random_model(folder: Path) -> None:
    """A tiny Llama with random weights, and a tokenizer of bytes with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*special, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    whole.add_special_tokens({"additional_special_tokens": special})
    whole.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(special) + len(letters),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=1,
        )
    )
    model.save_pretrained(folder)
    whole.save_pretrained(folder)


def report(comparison: Comparison, flags: argparse.Namespace, form: Form, machine: dict[str, Any]) -> str:
    """Writes the JSON file and the plot; returns the tables."""
    equal_steps, equal_time = comparison.lines()
    parts = []
    if comparison.speeds:
        parts += ["What a step costs:", speed_table(comparison.speeds)]
    if comparison.results:
        parts += ["The grid, seed 1:", grid_table(comparison.results, form.steps, 1)]
        plot(flags.folder / "quality.png", comparison.results, comparison.untouched, form.steps, 1)
    if comparison.best:
        parts += [f"At equal steps ({form.steps}), each at its best rates:", table(equal_steps)]
        for method in comparison.best:
            if method not in ("e2e", "frozen") and (share := closed(equal_steps, method)) is not None:
                parts.append(f"{method} closes {share:.0%} of the distance in answer loss from frozen to e2e.")
    if equal_time:
        parts += ["At the wall time that end-to-end training takes for as many steps:", table(equal_time)]
    content = {
        "machine": machine,
        "form": flags.form,
        **{name: asdict(form)[name] for name in ("steps", "rates", "seeds", "flags")},
        "speeds": comparison.speeds,
        UNTOUCHED: comparison.untouched,
        "trials": [result for result in comparison.results.values()],
        "best": comparison.best,
        "equal_steps": [asdict(line) for line in equal_steps],
        "equal_time": [asdict(line) for line in equal_time],
    }
    (flags.folder / "quality.json").write_text(json.dumps(content, indent=1) + "\n")
    return "\n\n".join([*parts, one_line(machine)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python benchmarks/quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--form", choices=FORMS, default="cpu", help="(default: %(default)s)")
    parser.add_argument("--model", type=Path, help="directory of the untouched model")
    parser.add_argument("--folder", type=Path, default=Path("quality"), help="for results (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="start nothing new after so long")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="(default: all)")
    for name, what in (
        ("train_file", "rows to train on, instead of reasoning-gym's"),
        ("validation_file", "rows to choose the rates by"),
        ("eval_file", "rows to measure on"),
    ):
        parser.add_argument(f"--{name}", type=Path, help=what)
    parser.add_argument("--general_file", type=Path, default=TEXTS / "general.jsonl", help="text that is to be kept")
    parser.add_argument(
        "--instructions_file", type=Path, default=TEXTS / "instructions.jsonl", help="conversations likewise"
    )
    parser.add_argument("--rates", type=float, nargs="+", help="another grid of learning rates")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--max_length", type=int, help="of a row in tokens (default: 512)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: of the form)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of every run, last of all")
    flags = parser.parse_args(arguments)
    if flags.form != "tiny" and flags.model is None:
        parser.error(f"--form {flags.form} needs --model; launch/quickstart.sh gets one")
    given = [flags.train_file, flags.validation_file, flags.eval_file]
    if any(given) and not all(given):
        parser.error("--train_file, --validation_file and --eval_file go together")
    # A token of the random model is a byte.
    flags.max_length = flags.max_length or (2048 if flags.form == "tiny" else 512)
    flags.device = flags.device or ("cuda" if flags.form == "gpu" else "cpu")
    if flags.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU")
    flags.side_by_side = torch.cuda.device_count() if flags.device == "cuda" else 2
    flags.pipeline_processes = min(2, flags.side_by_side)
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    flags = parse(arguments)
    form = FORMS[flags.form]
    changes = {"rates": tuple(flags.rates) if flags.rates else form.rates, "steps": flags.steps or form.steps}
    form = Form(**{**asdict(form), **changes})
    machine = describe_machine(torch.device(flags.device))
    comparison = Comparison(flags, prepare(flags, form), form)
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
