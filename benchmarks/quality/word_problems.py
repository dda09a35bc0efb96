"""Word problems: training on MetaMathQA, testing on GSM8K.

MetaMathQA (arXiv 2309.12284) rewrites the training questions of GSM8K (arXiv 2110.14168) and MATH; none comes from a
test set. Both are on the Hugging Face Hub; a directory with files of the same columns does as well.
"""

import re
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

import datasets

from benchmarks.quality.questions import Question

TRAINED_ON = "meta-math/MetaMathQA"
TESTED_ON = "openai/gsm8k"

SEED = 0
"""Of the order of the rows."""

COLUMNS = (("query", "response", "original_question"), ("question", "answer", "question"))
"""Question, answer, and the question that it was made from: as MetaMathQA and as GSM8K have them."""

# GSM8K has each calculation a second time, for a calculator: 16 - 3 = <<16-3=13>>13.
_CALCULATION = re.compile(r"<<[^<>]*>>")
_BEFORE_RESULT = re.compile(r"####|answer is", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


class UnknownRows(Exception):
    """A dataset that cannot be had, or has other columns; the message says which and what to do."""


class WordProblem(Question):
    """A question whose answer reasons step by step and ends with a number."""

    MAX_NEW_TOKENS = 400

    def is_answer(self, answer: str) -> bool:
        """Whether it comes to the same number."""
        right = result_of(self.entry["answer"])
        return right is not None and result_of(answer) == right


def result_of(answer: str) -> Fraction | None:
    """The number that an answer comes to: after `####` or `answer is`, else its last one. None where it has none."""
    *before, said = _BEFORE_RESULT.split(answer)
    if before and (numbers := _NUMBER.findall(said)):
        return _value(numbers[0])
    numbers = _NUMBER.findall(answer)
    return _value(numbers[-1]) if numbers else None


def _value(number: str) -> Fraction | None:
    over, _, under = number.replace(",", "").partition("/")
    try:
        return Fraction(over) / Fraction(under or 1)
    except ZeroDivisionError:
        return None


def load(train: str, test: str, numbers: Mapping[str, int]) -> dict[str, list[WordProblem]]:
    """The questions of each split.

    The validation rows are of the dataset that is trained on. No two of them were made from the same question, and none
    to train on from one of theirs or of the test's.

    Args:
        train: name on the hub, or directory, of the dataset that is trained and validated on.
        test: likewise, of that whose split `test` is tested on.
        numbers: of questions, by split: `train`, `validation` and `test`.

    Raises:
        UnknownRows: a dataset cannot be had, lacks the columns, or has too few rows.
    """
    rows, seen = _shuffled(train, "train"), set[str]()
    return {
        "test": _take(_problems(_shuffled(test, "test"), test), numbers["test"], test, seen, is_new=True),
        "validation": _take(_problems(rows, train), numbers["validation"], train, seen, is_new=True),
        "train": _take(_problems(rows, train), numbers["train"], train, seen, is_new=False),
    }


def _take(
    problems: Iterator[tuple[str, WordProblem]], number: int, name: str, seen: set[str], *, is_new: bool
) -> list[WordProblem]:
    """So many whose origin has not been seen; with `is_new` it has been afterwards, so that there is one of each."""
    taken: list[WordProblem] = []
    for origin, problem in problems:
        if len(taken) == number:
            break
        if origin not in seen:
            taken.append(problem)
            if is_new:
                seen.add(origin)
    if len(taken) < number:
        raise UnknownRows(f"{name} has {len(taken)} questions that can be used, and {number} are wanted")
    return taken


def _shuffled(name: str, split: str) -> datasets.Dataset:
    try:
        configs = datasets.get_dataset_config_names(name)
        rows = datasets.load_dataset(name, "main" if "main" in configs else None, split=split)
    # The library lets errors of many kinds through: no such name, no connection, no such split, a broken file.
    except Exception as error:
        raise UnknownRows(
            f"the split {split} of {name} cannot be loaded ({error}); give a name on the Hugging Face Hub, with "
            "HF_HUB_OFFLINE unset, or a directory with files"
        ) from error
    return rows.shuffle(seed=SEED)


def _problems(rows: datasets.Dataset, name: str) -> Iterator[tuple[str, WordProblem]]:
    """Each question, and the one that it was made from."""
    columns = next((columns for columns in COLUMNS if set(columns) <= set(rows.column_names)), None)
    if columns is None:
        wanted = " or ".join(" and ".join(dict.fromkeys(columns)) for columns in COLUMNS)
        raise UnknownRows(f"{name} has the columns {', '.join(rows.column_names)}; wanted are {wanted}")
    question, answer, origin = columns
    row: dict[str, Any]
    for row in rows:
        entry = {"question": row[question], "answer": _CALCULATION.sub("", row[answer])}
        yield row[origin].strip(), WordProblem("word problems", entry)
