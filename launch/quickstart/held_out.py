"""Measures a model on questions that it was not trained on: its loss on the answers, and what it answers itself.

With `--compare`, shows the figures beside those of another model.
"""

import argparse
import json
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lopt_pp.data import RowEncoder
from lopt_pp.distributed.devices import choose_device

Row = dict[str, str]


@dataclass(frozen=True)
class Result:
    """What was measured.

    Attributes:
        loss: mean cross entropy per token of the reference answers, over all rows.
        answers: the model's own to the first questions.
    """

    loss: float
    answers: list[str]


@torch.inference_mode()
def answer_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> float:
    """Returns the loss per answer token; the rows are encoded by the trainer's own code, so they mean the same."""
    encode = RowEncoder(tokenizer)
    total, count = 0.0, 0
    for row in rows:  # One by one: no padding, and there are few.
        encoded = encode(row)
        assert encoded is not None, "a row that the trainer would leave out"
        logits = model(torch.tensor([encoded.input_ids], device=model.device)).logits[0, :-1].float()
        labels = torch.tensor(encoded.labels[1:], device=model.device)
        total += functional.cross_entropy(logits, labels, reduction="sum").item()
        count += int((labels != -100).sum())
    return total / count


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, max_new_tokens: int) -> str:
    """Returns the model's most likely answer (greedy), cut after `max_new_tokens`."""
    messages = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
    output = model.generate(**prompt, do_sample=False, max_new_tokens=max_new_tokens)  # type: ignore[operator]
    generated = output[0, prompt["input_ids"].shape[1] :]
    is_cut = generated[-1] != tokenizer.eos_token_id
    return str(tokenizer.decode(generated, skip_special_tokens=True)).strip() + (" [...]" if is_cut else "")


def show(label: str, text: str) -> None:
    """Prints a labelled text as one paragraph."""
    print(textwrap.fill(" ".join(text.split()), 110, initial_indent=f"  {label:<11}", subsequent_indent=" " * 13))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory")
    parser.add_argument("--data", type=Path, required=True, help="rows with `question` and `answer` (JSON lines)")
    parser.add_argument("--out", type=Path, help="file for the result (JSON)")
    parser.add_argument("--compare", type=Path, help="a result of another model, to show beside this one")
    parser.add_argument("--num_answers", type=int, default=3, help="how many questions the model answers itself")
    parser.add_argument("--max_new_tokens", type=int, default=48, help="longest answer of the model")
    arguments = parser.parse_args()

    transformers.logging.disable_progress_bar()
    rows: list[Row] = [json.loads(line) for line in arguments.data.read_text(encoding="utf-8").splitlines()]
    shown = rows[: arguments.num_answers]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    model.to(torch.device(choose_device("auto", local_rank=0).device))  # type: ignore[arg-type]
    result = Result(
        answer_loss(model, tokenizer, rows),
        [answer(model, tokenizer, row["question"], arguments.max_new_tokens) for row in shown],
    )
    if arguments.out:
        arguments.out.write_text(json.dumps(asdict(result), indent=2), encoding="utf-8")

    results = {"model": result}
    if arguments.compare:
        before = Result(**json.loads(arguments.compare.read_text(encoding="utf-8")))
        results = {"before": before, "after": result}
    for row, *answers in zip(shown, *(each.answers for each in results.values()), strict=True):
        print()
        show("question:", row["question"])
        show("reference:", row["answer"])
        for name, text in zip(results, answers, strict=True):
            show(f"{name}:", text)
    print(f"\nLoss per answer token over {len(rows)} held-out rows:")
    for name, each in results.items():
        print(f"  {name + ':':<11}{each.loss:.4f}")


if __name__ == "__main__":
    main()
