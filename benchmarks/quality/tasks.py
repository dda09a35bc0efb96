"""The tasks that models are trained on: questions with checkable answers, made by `reasoning-gym`, offline."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import reasoning_gym

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {},
    "spell_backward": {},
    "family_relationships": {},
    "aiw": {"task_type_weights": [0.5, 0.5, 0.0]},  # Not the puzzles about colleagues: they are twice as long.
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 6},
    "number_filtering": {"max_numbers": 6, "max_decimals": 1},
}
"""Tasks of `reasoning-gym` with their settings: arithmetic, letters, word problems, reading. Rows of some 70 tokens."""

SYSTEM = "Give only the answer."
"""Without it a model that has not been trained explains, and a short answer cannot be compared."""

SEEDS = {"test": 2 * 10**6, "validation": 10**6, "train": 0}
"""Of each split. Question n of a task follows from seed + n, so they are further apart than any file is long."""


@dataclass(frozen=True)
class Question:
    """A question, and what its task knows about the answer.

    Attributes:
        task: of `TASKS`.
        entry: of `reasoning-gym`: `question`, `answer` and `metadata`.
    """

    task: str
    entry: dict[str, Any]

    @property
    def text(self) -> str:
        return self.entry["question"].strip()

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation that the model is to go on with."""
        return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.text}]

    @property
    def row(self) -> dict[str, list[dict[str, str]]]:
        """As a row of data."""
        return {
            "prompt": self.prompt,
            "completion": [{"role": "assistant", "content": self.entry["answer"].strip()}],
        }

    def is_answer(self, answer: str) -> bool:
        """Whether the answer is right, by the task's own judgement of it."""
        scorer = reasoning_gym.get_score_answer_fn(self.task)
        return scorer(answer.strip(), self.entry) == 1.0


def draw(numbers: Mapping[str, int]) -> dict[str, list[Question]]:
    """The questions of each split; the tasks take turns, and no question occurs twice, in whatever split.

    Args:
        numbers: of questions, by split.
    """
    # Small tasks repeat themselves. The test questions are drawn first, so that they are the same for any training.
    seen: set[str] = set()
    return {split: list(islice(_unseen(_endless(seed), seen), numbers[split])) for split, seed in SEEDS.items()}


def as_rows(questions: Sequence[Question]) -> str:
    """JSON lines for `--train_file` and the like."""
    return "".join(json.dumps(question.row) + "\n" for question in questions)


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, list[float]]:
    """By task, 1 for each right answer and 0 for each wrong one."""
    right: dict[str, list[float]] = {name: [] for name in TASKS}
    for question, answer in zip(questions, answers, strict=True):
        right[question.task].append(float(question.is_answer(answer)))
    return right


def _endless(seed: int) -> Iterator[Question]:
    # The size only ends the iteration: an entry is made when it is asked for.
    datasets = [
        (name, reasoning_gym.create_dataset(name, seed=seed, size=10**9, **settings))
        for name, settings in TASKS.items()
    ]
    for entries in zip(*(dataset for _, dataset in datasets), strict=True):
        for (name, _), entry in zip(datasets, entries, strict=True):
            yield Question(name, entry)


def _unseen(questions: Iterator[Question], seen: set[str]) -> Iterator[Question]:
    for question in questions:
        if question.text not in seen:
            seen.add(question.text)
            yield question
