"""What a trained model can do, and what it has kept: one process for one model.

    python -m benchmarks.quality.measure MODEL --base BASE --test test.jsonl [--questions questions.json]
        --general general.jsonl --instructions instructions.jsonl --output measured.json [--device cuda]

Answer loss and exact match on the test questions; perplexity on general text and on instructions; and the mean KL
divergence of the next-token distribution from the untouched model's on both; with --tasks, benchmarks of
lm-evaluation-harness. Each figure with its standard error over rows.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.questions import Question, accuracy, read
from benchmarks.quality.reasoning_tasks import ReasoningQuestion
from benchmarks.quality.summary import BENCHMARK
from benchmarks.quality.word_problems import WordProblem
from lopt_pp.commands.common import be_quiet
from lopt_pp.config.model import ModelConfig
from lopt_pp.data import DataConfig, TokenizedRows, load_rows
from lopt_pp.evaluation.lm_eval_harness import Benchmarks, run_benchmarks
from lopt_pp.evaluation.losses import compare_on, load_whole, loss_on
from lopt_pp.evaluation.scores import Score, perplexity
from lopt_pp.model.pretrained import load_tokenizer
from lopt_pp.objectives import ObjectiveConfig, task_objective


def rows_of(file: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenizedRows:
    rows = load_rows(DataConfig(train_file=[str(file)], max_length=max_length), tokenizer)
    assert isinstance(rows, TokenizedRows)
    return rows


@torch.no_grad()
def answers_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question], batch_size: int = 20
) -> list[str]:
    """The likeliest answer to each question, token by token."""
    tokenizer.padding_side = "left"
    # Of one length as far as can be: what is padding in a batch is computed for nothing.
    prompts = [
        tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, tokenize=False)
        for question in questions
    ]
    by_length = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    answers = [""] * len(prompts)
    for start in tqdm(range(0, len(by_length), batch_size), desc="answers", disable=None, leave=False):
        numbers = by_length[start : start + batch_size]
        batch = tokenizer(
            [prompts[number] for number in numbers], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        made = model.generate(  # type: ignore[operator]
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=max(question.MAX_NEW_TOKENS for question in questions),
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(made[:, batch.input_ids.shape[1] :], skip_special_tokens=True)
        for number, text in zip(numbers, texts, strict=True):
            answers[number] = text
    return answers


def measure(flags: argparse.Namespace) -> dict[str, object]:
    """All figures of a model; each a dict with `value` and `stderr`."""
    device = torch.device(flags.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tokenizer = load_tokenizer(ModelConfig(str(flags.base)))
    is_base = flags.model == flags.base
    figures: dict[str, object] = {}

    def keep(name: str, score: Score) -> None:
        figures[name] = {"value": score.value, "stderr": score.stderr}

    base = load_whole(ModelConfig(str(flags.base))).to(device, dtype)
    block = base if is_base else load_whole(ModelConfig(str(flags.model))).to(device, dtype)
    task = task_objective(ObjectiveConfig())
    keep("test_loss", loss_on(block, task, rows_of(flags.test, tokenizer, flags.max_length), device, "test"))
    for name, file in (("general", flags.general), ("instructions", flags.instructions)):
        rows = rows_of(file, tokenizer, flags.max_length)
        if len(rows) > flags.kept_rows:  # Some of each part of the file.
            rows = rows.select(np.linspace(0, len(rows) - 1, flags.kept_rows).astype(int), "beyond --kept_rows")
        loss, divergence = compare_on(base, block, rows, device, name)
        keep(f"{name}_loss", loss)
        keep(f"{name}_perplexity", Score(perplexity(loss.value)))
        keep(f"{name}_kl", divergence)
    del base, block
    if flags.tasks:
        benchmarks = Benchmarks(general_tasks=flags.tasks, limit=flags.limit, include_path=flags.include_path)
        for measure, score in run_benchmarks(str(flags.model), benchmarks, device, dtype).items():
            keep(f"{BENCHMARK}{measure.name} {measure.metric}", score)
    if flags.questions is not None:
        questions = read(flags.questions.read_text(), (ReasoningQuestion, WordProblem))
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(flags.model, dtype=dtype)
        model.to(device).eval()  # type: ignore[arg-type]
        answers = answers_of(model, tokenizer, questions)
        right = accuracy(questions, answers)
        scores = np.array([score for of_task in right.values() for score in of_task])
        keep("accuracy", Score.of_items(scores, np.ones(len(scores))))
        figures["accuracy_of_tasks"] = {name: float(np.mean(of_task)) for name, of_task in right.items()}
        figures["answers"] = [  # A few, to look at.
            {"question": question.text, "answer": question.entry["answer"], "given": answer}
            for question, answer in zip(questions[:12], answers, strict=False)
        ]
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    for name in ("base", "test", "general", "instructions", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--questions", type=Path, help="the test questions whole, where answers can be checked")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--kept_rows", type=int, default=1000, help="so many rows of each file of what is to be kept")
    parser.add_argument("--tasks", nargs="+", default=[], help="benchmarks of lm-evaluation-harness")
    parser.add_argument("--include_path", help="directory with benchmarks of one's own")
    parser.add_argument("--limit", type=float, help="items of each benchmark, or a share of them below 1")
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args(arguments)
    be_quiet()
    flags.output.write_text(json.dumps(measure(flags), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
