"""Questions of many kinds, made by `reasoning-gym`, offline."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import reasoning_gym

from benchmarks.quality.questions import Question

TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {},
    "spell_backward": {},
    "family_relationships": {},
    "aiw": {"task_type_weights": [0.5, 0.5, 0.0]},  # Not the puzzles about colleagues: they are twice as long.
    "needle_haystack": {"min_num_statements": 3, "max_num_statements": 6},
    "number_filtering": {"max_numbers": 6, "max_decimals": 1},
}
"""Tasks of `reasoning-gym` with their settings: arithmetic, letters, word problems, reading. Rows of some 70 tokens."""

SEEDS = {"test": 2 * 10**6, "validation": 10**6, "train": 0}
"""Of each split. Question n of a task follows from seed + n, so they are further apart than any file is long."""


class ReasoningQuestion(Question):
    """A question of `reasoning-gym`."""

    SYSTEM = "Give only the answer."  # A model that has not been trained explains, and short answers are compared.
    MAX_NEW_TOKENS = 48  # The longest right answers, lists of numbers, have about forty.

    def is_answer(self, answer: str) -> bool:
        """Whether the answer is right, by the task's own judgement of it."""
        scorer = reasoning_gym.get_score_answer_fn(self.task)
        return scorer(answer.strip(), self.entry) == 1.0


def draw(numbers: Mapping[str, int]) -> dict[str, list[ReasoningQuestion]]:
    """The questions of each split; the tasks take turns, and no question occurs twice, in whatever split.

    Args:
        numbers: of questions, by split.
    """
    # Small tasks repeat themselves. The test questions are drawn first, so that they are the same for any training.
    seen: set[str] = set()
    return {split: list(islice(_unseen(_endless(seed), seen), numbers[split])) for split, seed in SEEDS.items()}


def _endless(seed: int) -> Iterator[ReasoningQuestion]:
    # The size only ends the iteration: an entry is made when it is asked for.
    datasets = [
        (name, reasoning_gym.create_dataset(name, seed=seed, size=10**9, **settings))
        for name, settings in TASKS.items()
    ]
    for entries in zip(*(dataset for _, dataset in datasets), strict=True):
        for (name, _), entry in zip(datasets, entries, strict=True):
            yield ReasoningQuestion(name, entry)


def _unseen(questions: Iterator[ReasoningQuestion], seen: set[str]) -> Iterator[ReasoningQuestion]:
    for question in questions:
        if question.text not in seen:
            seen.add(question.text)
            yield question
