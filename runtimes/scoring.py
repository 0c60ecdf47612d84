"""Scoring: texts or pairs of texts to scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.manifest import ScoringInfo
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import Engine, check_texts
from edgelm.runtimes.heads import Head
from edgelm.runtimes.ranking import Ranked, rank

Activation = Literal["none", "sigmoid", "softmax"]


@dataclass(frozen=True)
class Label:
    """A label of a text and its score."""

    label: str
    score: float


class Scorer:
    """Scores texts or pairs of texts.

    Attributes:
        engine: The opened bundle.
        labels: Names of the scores, in order.
        takes_pairs: Whether an input is a pair of texts.
        range: Least and greatest score there can be; None where there is no such.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened scoring bundle; `edgelm.load` does it."""
        info = engine.manifest.scoring or ScoringInfo((), "none", "single")
        self.engine = engine
        self.labels = info.labels
        self.takes_pairs = info.inputs == "pair"
        self.range = (info.range[0], info.range[1]) if info.range else None
        self._activation: Activation = info.activation
        self._head = engine.head

    def score(
        self,
        inputs: Sequence[str] | Sequence[tuple[str, str]],
        *,
        activation: Activation | None = None,
    ) -> NDArray[np.float32]:
        """Score each input.

        Args:
            inputs: Texts, or pairs of texts where the bundle takes pairs. What is
                longer than the model takes is cut (`score_with_truncation` tells
                which).
            activation: Applied to the logits in place of the bundle's own; ``none``
                gives the raw ones, outside of any range.

        Returns:
            float32 ``[n]`` where there is one label, else ``[n, labels]``.

        Raises:
            InputError: An input is not what the bundle takes.
        """
        return self.score_with_truncation(inputs, activation=activation)[0]

    def score_with_truncation(
        self,
        inputs: Sequence[str] | Sequence[tuple[str, str]],
        *,
        activation: Activation | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Score each input, and say which inputs were cut.

        Args:
            inputs: As for `score`.
            activation: As for `score`.

        Returns:
            The scores, and a bool ``[n]``: True where an input was longer than the
            model takes.
        """
        rows, truncated = self._logits(inputs)
        return self.scores_of(rows, activation=activation), truncated

    def scores_of(
        self, logits: NDArray[np.float32], *, activation: Activation | None = None
    ) -> NDArray[np.float32]:
        """Scores, as `score` gives them, of logits, float32 ``[n, labels]``."""
        scores = activate(logits, activation or self._activation)
        if activation is None and self.range is not None:
            scores = np.clip(scores, *self.range)
        return scores[:, 0] if len(self.labels) == 1 else scores

    def classify(
        self,
        inputs: Sequence[str] | Sequence[tuple[str, str]],
        *,
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[list[Label]]:
        """Labels of each input, the likeliest first.

        Args:
            inputs: As for `score`.
            top_k: How many labels to give of each; all if not given.
            threshold: Least score of a label that is given; with labels that do not
                exclude each other (sigmoid) 0.5 is usual.

        Returns:
            For each input its labels by falling score; of equals the earlier in `labels`.

        Raises:
            InputError: An input is not what the bundle takes, or ``top_k`` is less than 1.
        """
        scores = self.score(inputs).reshape(len(inputs), len(self.labels))
        least = -np.inf if threshold is None else threshold
        return [
            [
                Label(self.labels[place.index], place.score)
                for place in rank(row, top_k)
                if place.score >= least
            ]
            for row in scores
        ]

    def rerank(
        self, query: str, documents: Sequence[str], *, top_k: int | None = None
    ) -> list[Ranked]:
        """Documents by how well they fit a query.

        Args:
            query: First text of every pair.
            documents: Second texts.
            top_k: How many to give; all if not given.

        Returns:
            Places in ``documents`` by falling score; of equals the earlier comes first.

        Raises:
            InputError: The bundle does not give one score of a pair, a text is no
                string, or ``top_k`` is less than 1.
        """
        if not self.takes_pairs or len(self.labels) != 1:
            raise InputError(
                f"{self.engine.name} does not rank: that needs a bundle with one score of a pair, a cross-encoder."
            )
        check_texts([query])
        check_texts(documents)
        return rank(self.score([(query, text) for text in documents]), top_k)

    def compare(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Which of two texts scores higher.

        The margin is the difference of the texts' raw scores, so
        ``compare([(a, b)]) == -compare([(b, a)])`` exactly. Where the scores were fitted
        to comparisons (`edgelm fit-head --compare`), its sigmoid is the probability that
        the first text wins (Bradley and Terry 1952).

        Args:
            pairs: Pairs of texts.

        Returns:
            float32 ``[n]``: above 0 where the first text scores higher.

        Raises:
            InputError: The bundle does not give one score of one text, or an input is
                no pair of texts.
        """
        if self.takes_pairs or len(self.labels) != 1:
            raise InputError(
                f"{self.engine.name} does not compare: that needs a bundle with one score of one text."
            )
        first, second = _split_pairs(pairs)
        check_texts(first + second)
        # In one order whoever is first: a dynamic int8 graph sees its neighbours.
        texts = sorted({*first, *second})
        raw = dict(zip(texts, self._logits(texts)[0][:, 0], strict=True))
        margins = [raw[a] - raw[b] for a, b in zip(first, second, strict=True)]
        return np.array(margins, np.float32)

    def _logits(
        self, inputs: Sequence[str] | Sequence[tuple[str, str]]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits, float32 ``[n, labels]``, and which inputs were cut."""
        if self._head is not None:
            return self._head_logits(self._head, inputs)
        if self.takes_pairs:
            first, second = _split_pairs(inputs)
            encodings = self.engine.tokenize(first, second)
        else:
            encodings = self.engine.tokenize(list(inputs))  # type: ignore[arg-type]
        truncated = np.array([bool(e.overflowing) for e in encodings], dtype=bool)
        rows = np.array(self.engine.run(encodings), dtype=np.float32)
        return rows.reshape(len(encodings), len(self.labels)), truncated

    def _head_logits(
        self, head: Head, inputs: Sequence[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The same where a head stands behind an encoder; each text is encoded once."""
        embedder = Embedder(self.engine)
        if not self.takes_pairs:
            vectors, cut = embedder.encode_with_truncation(inputs)
            return head.logits(vectors), cut
        first, second = _split_pairs(inputs)
        check_texts(first + second)
        texts = list(dict.fromkeys(first + second))
        place = {text: i for i, text in enumerate(texts)}
        vectors, cut = embedder.encode_with_truncation(texts)
        a = np.array([place[text] for text in first], np.int64)
        b = np.array([place[text] for text in second], np.int64)
        return head.logits(vectors[a], vectors[b]), cut[a] | cut[b]


def activate(logits: NDArray[np.float32], activation: str) -> NDArray[np.float32]:
    """Turn logits into scores.

    Args:
        logits: float32 ``[n, labels]``.
        activation: ``sigmoid``, ``softmax`` or ``none``.

    Returns:
        float32 ``[n, labels]``.

    Raises:
        InputError: There is no such activation.
    """
    if activation not in get_args(Activation):
        raise InputError(
            f"The activation must be one of {', '.join(get_args(Activation))}. Got {activation!r} instead."
        )
    if activation == "sigmoid":
        return (0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))).astype(
            np.float32
        )
    if activation == "softmax":
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        exponents = np.exp(shifted)
        scores: NDArray[np.float32] = exponents / exponents.sum(axis=-1, keepdims=True)
        return scores.astype(np.float32)
    return logits


def _split_pairs(inputs: Sequence[object]) -> tuple[list[str], list[str]]:
    first: list[str] = []
    second: list[str] = []
    for i, pair in enumerate(inputs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise InputError(
                f"Input {i} must be a pair of texts. Got {pair!r} instead."
            )
        first.append(pair[0])
        second.append(pair[1])
    return first, second
