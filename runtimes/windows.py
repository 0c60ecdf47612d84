"""Texts to tokens, however long: read in overlapping windows, and joined again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.engine import Engine, check_texts

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class Tokens:
    """A text's tokens without the special ones, its windows joined.

    Attributes:
        offsets: ``[tokens, 2]``: start and end in code points.
        words: Word of each token, ``[tokens]``, never falling.
        rows: What the model gives of each token, ``[tokens, width]``.
    """

    offsets: NDArray[np.int64]
    words: NDArray[np.int64]
    rows: NDArray[np.floating]

    def word_starts(self) -> NDArray[np.int64]:
        """The first token of each word."""
        return np.flatnonzero(np.diff(self.words, prepend=-1))

    def places(self, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Start and end, ``[parts, 2]``, of parts of the text that begin at these tokens."""
        ends = np.maximum.reduceat(self.offsets[:, 1], starts)
        return np.stack([self.offsets[starts, 0], ends], axis=1)


@dataclass(frozen=True)
class Text:
    """A text as it was given, and its words where they were given.

    Attributes:
        text: The text.
        words: Start and end of each word, in code points; None for a plain text.
    """

    text: str
    words: list[tuple[int, int]] | None = None

    @classmethod
    def of(cls, item: object, i: int) -> Text:
        """From what the caller gave."""
        if isinstance(item, str):
            return cls(item)
        if not isinstance(item, Sequence) or not all(isinstance(w, str) for w in item):
            raise InputError(
                f"Text {i} must be a string or a list of words. Got {type(item).__name__} instead."
            )
        words, start = [], 0
        for word in item:
            words.append((start, start + len(word)))
            start += len(word) + 1
        return cls(" ".join(item), words)

    def word_of(self, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which given word a token stands in; without any, words are between white space."""
        if self.words is not None:
            starts = [start for start, _ in self.words]
        else:
            spaces = [-1, *(i for i, c in enumerate(self.text) if c.isspace())]
            starts = [i + 1 for i in spaces]
        found = []
        for begin, end in offsets.tolist():
            begin = without_space(self.text, begin, end)
            found.append(bisect_right(starts, begin) - 1)
        return np.maximum.accumulate(np.array(found, np.int64))


def texts_of(texts: object) -> list[Text]:
    """What a caller gave, as texts.

    Raises:
        InputError: Something among the texts is neither a string nor a list of strings.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Sequence):
        check_texts(texts)
        return []
    return [Text.of(item, i) for i, item in enumerate(texts)]


def read_windows(engine: Engine, texts: Sequence[Text]) -> list[list[Encoding]]:
    """The windows of each text, one where it fits."""
    return [[e, *e.overflowing] for e in engine.tokenize([t.text for t in texts])]


def flat(groups: Sequence[Sequence[Encoding]]) -> list[Encoding]:
    """Every window in turn."""
    return [window for group in groups for window in group]


def read_tokens(engine: Engine, texts: Sequence[Text], output: str) -> Iterator[Tokens]:
    """The tokens of texts, however long, with their rows of an output of the graph."""
    groups = read_windows(engine, texts)
    return join_windows(engine, texts, groups, engine.run(flat(groups), output))


def join_windows(
    engine: Engine,
    texts: Sequence[Text],
    groups: Sequence[Sequence[Encoding]],
    given: Sequence[NDArray[np.float32]],
) -> Iterator[Tokens]:
    """The tokens of texts that were read in windows.

    Args:
        engine: Whose tokenizer cut them.
        texts: The texts.
        groups: The windows of each.
        given: Of every window in turn a row, ``[width]``, of each of its tokens.

    Yields:
        For each text its tokens. Of the windows that hold a token, the one speaks in which it
        has the most context.
    """
    rows = iter(given)
    stride = (engine.tokenizer.truncation or {}).get("stride", 0)
    # A tokenizer that does not split a text into words first says "word 0" always.
    probe = engine.tokenizer.encode("a b", add_special_tokens=False).word_ids
    splits_words = len(set(probe)) > 1
    for text, group in zip(texts, groups, strict=True):
        tokens = _join(group, [next(rows) for _ in group], stride)
        if text.words is not None or not splits_words:
            tokens = replace(tokens, words=text.word_of(tokens.offsets))
        yield _without_spaces(tokens, text.text)


def _join(
    windows: Sequence[Encoding], given: Sequence[NDArray[np.float32]], stride: int
) -> Tokens:
    """Join the windows of a text."""
    inner = [np.flatnonzero(np.equal(w.special_tokens_mask, 0)) for w in windows]
    step = len(inner[0]) - stride if len(windows) > 1 else 0
    total = step * (len(windows) - 1) + len(inner[-1])
    best = np.full(total, -1)
    offsets = np.zeros((total, 2), np.int64)
    words = np.zeros(total, np.int64)
    rows = np.zeros((total, given[0].shape[-1]), np.float32)
    for w, (window, kept) in enumerate(zip(windows, inner, strict=True)):
        n = len(kept)
        # The edges of the text are no edges: nothing is missing there.
        left = np.arange(n) if w > 0 else np.full(n, n)
        right = np.arange(n)[::-1] if w < len(windows) - 1 else np.full(n, n)
        context = np.minimum(left, right)
        place = np.arange(w * step, w * step + n)
        better = context > best[place]
        place, kept = place[better], kept[better]
        best[place] = context[better]
        offsets[place] = np.array(window.offsets).reshape(-1, 2)[kept]
        ids = [-1 if word is None else word for word in window.word_ids]
        words[place] = np.array(ids, np.int64)[kept]
        rows[place] = given[w][kept]
    known = words >= 0
    return Tokens(offsets[known], words[known], rows[known])


def _without_spaces(tokens: Tokens, text: str) -> Tokens:
    """Without the words that are white space alone, which some tokenizers make of a second space."""
    if not len(tokens.words):
        return tokens
    blank = [not text[begin:end].strip() for begin, end in tokens.offsets.tolist()]
    if not any(blank):
        return tokens
    starts = tokens.word_starts()
    sizes = np.diff(starts, append=len(blank))
    kept = ~np.repeat(np.logical_and.reduceat(blank, starts), sizes)
    return Tokens(tokens.offsets[kept], tokens.words[kept], tokens.rows[kept])


def without_space(text: str, begin: int, end: int) -> int:
    """Where a token begins: some tokenizers count the space before a word as its own."""
    return begin + len(text[begin:end]) - len(text[begin:end].lstrip())
