"""Named-entity recognition: texts to entities with character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import NerInfo
from edgelm.runtimes.engine import Engine

if TYPE_CHECKING:
    from tokenizers import Encoding


@dataclass(frozen=True)
class Entity:
    """A named entity.

    Attributes:
        start: First character in the text.
        end: One behind its last character.
        label: Its type, for example ``PER``.
        score: Mean probability of its words' labels, 0..1.
        text: ``text[start:end]``.
    """

    start: int
    end: int
    label: str
    score: float
    text: str


@dataclass(frozen=True)
class _Words:
    """A text's words, each with its label probabilities.

    Attributes:
        offsets: ``(start, end)`` of each word in the text.
        probabilities: float ``[words, labels]``: those of the word's first token.
    """

    offsets: list[tuple[int, int]]
    probabilities: NDArray[np.float64]


class EntityRecognizer:
    """Finds named entities.

    Attributes:
        engine: The opened bundle.
        labels: Labels of a token, in the order of the logits.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened NER bundle; `edgelm.load` does it."""
        info = engine.manifest.ner or NerInfo((), "BIO")
        self.engine = engine
        self.labels = info.labels
        self._start, self._allowed = transitions(info.labels)

    def extract(self, texts: Sequence[str]) -> list[list[Entity]]:
        """Find the entities of each text.

        A text longer than the model takes is read in overlapping windows, so
        nothing is cut; each token's label comes from the window in which it has
        the most context.

        Args:
            texts: The texts.

        Returns:
            For each text its entities, by position; offsets count code points.

        Raises:
            InputError: Something among the texts is not a string.
        """
        groups = [[e, *e.overflowing] for e in self.engine.tokenize(texts)]
        logits = iter(self.engine.run([window for group in groups for window in group]))
        return [
            self._entities(text, self._words(group, [next(logits) for _ in group]))
            for text, group in zip(texts, groups, strict=True)
        ]

    def _words(
        self, windows: Sequence[Encoding], logits: Sequence[NDArray[np.float32]]
    ) -> _Words:
        """Join the windows of a text; the first token of a word speaks for it."""
        best: dict[int, tuple[int, NDArray[np.float32]]] = {}
        offsets: dict[int, tuple[int, int]] = {}
        last_window = len(windows) - 1
        for w, (window, rows) in enumerate(zip(windows, logits, strict=True)):
            where = window.offsets
            tokens = [(t, k) for t, k in enumerate(window.word_ids) if k is not None]
            previous = None
            for position, (token, word) in enumerate(tokens):
                begin, end = where[token]
                known = offsets.get(word, (begin, end))
                offsets[word] = (min(known[0], begin), max(known[1], end))
                continues = word == previous or known[0] < begin
                previous = word
                # The edges of the text are no edges: nothing is missing there.
                left = position if w > 0 else len(tokens)
                right = len(tokens) - 1 - position if w < last_window else len(tokens)
                context = min(left, right)
                if not continues and (word not in best or context > best[word][0]):
                    best[word] = (context, rows[token])
        order = sorted(best)
        stacked = np.array([best[word][1] for word in order], dtype=np.float64)
        stacked = stacked.reshape(len(order), len(self.labels))
        return _Words([offsets[word] for word in order], softmax(stacked))

    def _entities(self, text: str, words: _Words) -> list[Entity]:
        path = viterbi(np.log(words.probabilities + 1e-30), self._start, self._allowed)
        entities = []
        for begin, end, label in spans([self.labels[k] for k in path]):
            start, stop = words.offsets[begin][0], words.offsets[end - 1][1]
            # Tokenizers with a space mark count the space before a word as its own.
            start += len(text[start:stop]) - len(text[start:stop].lstrip())
            chosen = words.probabilities[range(begin, end), path[begin:end]]
            entities.append(
                Entity(start, stop, label, float(chosen.mean()), text[start:stop])
            )
        return entities


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Softmax over the last axis."""
    exponents = np.exp(logits - logits.max(axis=-1, keepdims=True, initial=-np.inf))
    result: NDArray[np.float64] = exponents / exponents.sum(axis=-1, keepdims=True)
    return result


def transitions(labels: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which labels may begin a text, and which may follow which.

    Args:
        labels: ``O``, ``B-x``, ``I-x``, and where the scheme has them ``E-x``
            and ``S-x`` (``L-x``, ``U-x``); or ``O`` and bare types.

    Returns:
        bool ``[labels]`` and bool ``[labels, labels]`` (from, to).
    """
    parts = [_split(label) for label in labels]
    kinds = {kind for kind, _ in parts}
    has_begin, has_end = "B" in kinds, "E" in kinds

    def follows(before: tuple[str, str], after: tuple[str, str]) -> bool:
        open_type = before[1] if before[0] in ("B", "I") else None
        if after[0] in ("I", "E") and has_begin:
            return open_type == after[1]
        return not (has_end and open_type is not None)

    outside = ("O", "")
    start = np.array([follows(outside, part) for part in parts])
    allowed = np.array([[follows(a, b) for b in parts] for a in parts])
    return start, allowed


def viterbi(
    scores: NDArray[np.float64],
    start: NDArray[np.bool_],
    allowed: NDArray[np.bool_],
) -> list[int]:
    """The best sequence of labels that the scheme allows.

    Args:
        scores: Log-probabilities ``[words, labels]``.
        start: Which labels may begin, bool ``[labels]``.
        allowed: Which label may follow which, bool ``[labels, labels]``.

    Returns:
        The label index of each word.
    """
    if not len(scores):
        return []
    barrier = np.where(allowed, 0.0, -1e9)
    total = scores[0] + np.where(start, 0.0, -1e9)
    choices = []
    for row in scores[1:]:
        paths = total[:, None] + barrier
        choices.append(paths.argmax(axis=0))
        total = paths.max(axis=0) + row
    path = [int(total.argmax())]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return path[::-1]


def spans(labels: Sequence[str]) -> list[tuple[int, int, str]]:
    """Spans of a sequence of labels.

    Args:
        labels: In BIO, BIOES, BILOU or IO.

    Returns:
        ``(begin, end, type)`` of each entity, half-open, in words. A part that
        continues nothing begins an entity.
    """
    found: list[tuple[int, int, str]] = []
    begin, kind = 0, ""
    for i, label in enumerate([*labels, "O"]):
        part, name = _split(label)
        if kind and not (part in ("I", "E") and name == kind):
            found.append((begin, i, kind))
            kind = ""
        if part != "O" and not kind:
            begin, kind = i, name
        if kind and part in ("E", "S"):
            found.append((begin, i + 1, kind))
            kind = ""
    return found


def _split(label: str) -> tuple[str, str]:
    """``"B-PER"`` to ``("B", "PER")``; BILOU's L and U are E and S; a bare type is I."""
    if label == "O":
        return "O", ""
    part, dash, name = label.partition("-")
    if dash and part in ("B", "I", "E", "S", "L", "U"):
        return {"L": "E", "U": "S"}.get(part, part), name
    return "I", label
