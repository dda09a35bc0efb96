"""Token ids of a text that is cut in places, so that the loss can count on some of it."""

import bisect
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lopt_pp.errors import LoptError, first_line

Span = tuple[int, int]
"""A stretch of a text or of its tokens, from its first to before its last."""


_FAR, _SURE = 512, 128
"""Tokens: so many are encoded anew before a cut, where no added token is nearer; if so many before it are as they are
in the whole text, so are all before those."""


@dataclass(frozen=True)
class _Window:
    """What is before a cut.

    Attributes:
        cut: the place in the text.
        first: the number of the last added token before it, or 0.
        begin: the number of the token from which on it is encoded anew.
        end: the number of tokens that end before the cut.
    """

    cut: int
    first: int
    begin: int
    end: int


class Cutter:
    """Encodes texts, without the special tokens that the tokenizer puts around one by itself.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.get_added_vocab().values())
        # Some tokenizers of Python keep the token that ends a text among the others.
        self._ends = (self._added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
        self.is_blank: dict[int, bool] = {}
        bare = tokenizer.encode("a", add_special_tokens=False, verbose=False)
        whole = tokenizer.encode("a", add_special_tokens=True, verbose=False)
        starts = (start for start in range(len(whole)) if bare and whole[start : start + len(bare)] == bare)
        self.opening: list[int] = whole[: next(starts, 0)]
        """The special tokens before a text. Those behind it are left out: they would part a prompt from its answer."""

    def at_cuts(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Encodes a text so that no token reaches over an end of a span: generation, too, starts behind a prompt.

        The text is encoded as a whole where that leaves the tokens before a cut as they are without what follows it,
        since tokenizers that put a space before a text would put one before a part encoded by itself. Otherwise what
        follows the cut is encoded by itself.

        Args:
            text: to encode.
            spans: of the text, in order, none over another.

        Returns:
            The token ids, and the spans of them that belong to `spans`.

        Raises:
            LoptError: the text is not Unicode.
        """
        _check(text)
        cuts = sorted({place for span in spans for place in span} - {0, len(text)})
        places = self._cut(text, cuts) if self._tokenizer.is_fast else self._cut_slowly(text, cuts)
        input_ids, before = places
        number = {0: 0, len(text): len(input_ids)} | dict(zip(cuts, before, strict=True))
        return input_ids, [(number[start], number[stop]) for start, stop in spans]

    def touching(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[Span]]:
        """Encodes a text as a whole; to a span belong all tokens that have a character of it, as in `transformers`.

        See `at_cuts`, which this is for tokenizers that cannot say which token a character went to.
        """
        if not self._tokenizer.is_fast:
            return self.at_cuts(text, spans)
        _check(text)
        input_ids, offsets = self._encode(text)
        starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
        return input_ids, [
            (bisect.bisect_right(stops, start), bisect.bisect_left(starts, stop)) for start, stop in spans
        ]

    def last_token(self, input_ids: Sequence[int]) -> int | None:
        """The last token that is not white space."""
        for token in reversed(input_ids):
            if token not in self.is_blank:
                self.is_blank[token] = not str(self._tokenizer.decode([token])).strip()
            if not self.is_blank[token]:
                return token
        return None

    def is_added(self, token: int | None) -> bool:
        """Whether it is one of the tokens that were added to those of the text, as those are that end a turn."""
        return token in self._ends

    def __getstate__(self) -> dict[str, Any]:
        # What was found out on the way must not make another encoder of this, for caches that go by it.
        return self.__dict__ | {"is_blank": {}}

    def _encode(self, text: str) -> tuple[list[int], list[Span]]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return encoded["input_ids"], encoded["offset_mapping"]

    def _cut(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens, and for each cut how many are before it, in time that is linear in the text.

        Whether the tokens before a cut stay as they are is told by the text from the last added token before it:
        tokenizers encode what lies between two of these by itself. Where that is far away, by a part of it.
        """
        done: list[int] = []
        before: list[int] = []
        base = 0
        while True:
            rest, remaining = text[base:], [cut - base for cut in cuts[len(before) :]]
            tokens, offsets = self._encode(rest)
            windows = self._windows(tokens, offsets, remaining)
            alone = self._encode_all(rest[_start_of(near, offsets) : near.cut] for near in windows)
            settled = last_cut = 0
            for near, encoded in zip(windows, alone, strict=True):
                if near.first < near.begin and encoded[-_SURE:] == tokens[near.end - _SURE : near.end]:
                    end = near.end
                else:
                    if near.first < near.begin:
                        whole = dataclasses.replace(near, begin=near.first)
                        (encoded,) = self._encode_all([rest[_start_of(whole, offsets) : near.cut]])
                    end = near.first + len(encoded)
                    if tokens[near.first : end] != encoded:  # A token of the whole reaches over the cut.
                        upto = [*tokens[: near.first], *encoded]
                        if upto[:settled] == tokens[:settled]:
                            before.append(len(done) + len(upto))
                            settled, last_cut, tokens = len(upto), near.cut, upto
                        done += tokens[:settled]
                        base += last_cut
                        break
                before.append(len(done) + end)
                settled, last_cut = end, near.cut
            else:
                return done + tokens, before

    def _windows(self, tokens: Sequence[int], offsets: Sequence[Span], cuts: Iterable[int]) -> list[_Window]:
        """What is to be encoded by itself for each cut."""
        stops = [stop for _, stop in offsets]
        added = [number for number, token in enumerate(tokens) if token in self._added]
        added_stops = [stops[number] for number in added]
        windows = []
        for cut in cuts:
            place, end = bisect.bisect_right(added_stops, cut), bisect.bisect_right(stops, cut)
            first = added[place - 1] if place else 0
            windows.append(_Window(cut, first, first if end - first <= _FAR else end - _FAR, end))
        return windows

    def _encode_all(self, texts: Iterable[str]) -> list[list[int]]:
        # Not by `self._tokenizer`, which takes ten times as long for a short text.
        backend = self._tokenizer.backend_tokenizer
        return [backend.encode(text, add_special_tokens=False).ids for text in texts]

    def _cut_slowly(self, text: str, cuts: Sequence[int]) -> tuple[list[int], list[int]]:
        """What `_cut` does, for tokenizers that cannot say which token a character went to."""
        input_ids: list[int] = []
        before = []
        start = 0
        for cut in (*cuts, len(text)):
            together = self._tokenizer.encode(text[:cut], add_special_tokens=False, verbose=False)
            if together[: len(input_ids)] == input_ids:
                input_ids = together
            else:
                input_ids = input_ids + self._tokenizer.encode(text[start:cut], add_special_tokens=False, verbose=False)
            before.append(len(input_ids))
            start = cut
        return input_ids, before[:-1]


def _start_of(window: _Window, offsets: Sequence[Span]) -> int:
    return offsets[window.begin][0] if window.begin else 0


def _check(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LoptError(f"its text is not Unicode: {first_line(error)}; change the row or leave it out") from error
