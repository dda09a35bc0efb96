"""Questions whose answers can be checked: what a model learns from, and what it is asked afterwards."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Question(ABC):
    """A question with its answer; one subclass for each place that questions come from.

    Attributes:
        task: that it belongs to.
        entry: `question` and `answer`, and what else the judge of an answer needs.
    """

    SYSTEM: ClassVar[str | None] = None
    """What comes before the question in the conversation."""

    MAX_NEW_TOKENS: ClassVar[int]
    """As long as an answer may be."""

    task: str
    entry: dict[str, Any]

    @abstractmethod
    def is_answer(self, answer: str) -> bool:
        """Whether the answer is right."""

    @property
    def text(self) -> str:
        return self.entry["question"].strip()

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The conversation that the model is to go on with."""
        before = [] if self.SYSTEM is None else [{"role": "system", "content": self.SYSTEM}]
        return [*before, {"role": "user", "content": self.text}]

    @property
    def row(self) -> dict[str, list[dict[str, str]]]:
        """As a row of data."""
        return {
            "prompt": self.prompt,
            "completion": [{"role": "assistant", "content": self.entry["answer"].strip()}],
        }


def as_rows(questions: Iterable[Question]) -> str:
    """JSON lines for `--train_file` and the like."""
    return "".join(json.dumps(question.row) + "\n" for question in questions)


def as_json(questions: Iterable[Question]) -> str:
    """All that there is to know of them, for `read`."""
    return json.dumps([{"kind": type(question).__name__} | asdict(question) for question in questions])


def read(text: str, kinds: Iterable[type[Question]]) -> list[Question]:
    """The questions that `as_json` has written.

    Args:
        text: of JSON.
        kinds: that may be among them.
    """
    by_name = {kind.__name__: kind for kind in kinds}
    return [by_name[content.pop("kind")](**content) for content in json.loads(text)]


def accuracy(questions: Sequence[Question], answers: Sequence[str]) -> Mapping[str, list[float]]:
    """By task, 1 for each right answer and 0 for each wrong one."""
    right: dict[str, list[float]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right.setdefault(question.task, []).append(float(question.is_answer(answer)))
    return right
