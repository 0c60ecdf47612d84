"""Scoring: texts or pairs of texts to scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import ScoringInfo
from edgelm.errors import InputError
from edgelm.runtimes.engine import Engine


class Scorer:
    """Scores texts or pairs of texts.

    Attributes:
        engine: The opened bundle.
        labels: Names of the scores, in order.
        takes_pairs: Whether an input is a pair of texts.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened scoring bundle; `edgelm.load` does it."""
        info = engine.manifest.scoring or ScoringInfo((), "none", "single")
        self.engine = engine
        self.labels = info.labels
        self.takes_pairs = info.inputs == "pair"
        self._activation = info.activation

    def score(
        self, inputs: Sequence[str] | Sequence[tuple[str, str]]
    ) -> NDArray[np.float32]:
        """Score each input.

        Args:
            inputs: Texts, or pairs of texts where the bundle takes pairs. What is
                longer than the model takes is cut (`score_with_truncation` tells
                which).

        Returns:
            float32 ``[n]`` where there is one label, else ``[n, labels]``.

        Raises:
            InputError: An input is not what the bundle takes.
        """
        return self.score_with_truncation(inputs)[0]

    def score_with_truncation(
        self,
        inputs: Sequence[str] | Sequence[tuple[str, str]],
        *,
        activation: Literal["sigmoid", "softmax", "none"] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Score each input, and say which inputs were cut.

        Args:
            inputs: As for `score`.
            activation: What turns logits into scores; the bundle's if not given.

        Returns:
            The scores, and a bool ``[n]``: True where an input was longer than the
            model takes.
        """
        if self.takes_pairs:
            first, second = _split_pairs(inputs)
            encodings = self.engine.tokenize(first, second)
        else:
            encodings = self.engine.tokenize(list(inputs))  # type: ignore[arg-type]
        truncated = np.array([bool(e.overflowing) for e in encodings], dtype=bool)
        rows = np.array(self.engine.run(encodings), dtype=np.float32)
        scores = activate(
            rows.reshape(len(encodings), len(self.labels)),
            activation or self._activation,
        )
        return (scores[:, 0] if len(self.labels) == 1 else scores), truncated


def activate(logits: NDArray[np.float32], activation: str) -> NDArray[np.float32]:
    """Turn logits into scores.

    Args:
        logits: float32 ``[n, labels]``.
        activation: ``sigmoid``, ``softmax`` or ``none``.

    Returns:
        float32 ``[n, labels]``.
    """
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
