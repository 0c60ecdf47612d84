"""Measures shared by verification, the suites and the tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Span = tuple[int, int, str]
# Measures of which a smaller value is better.
LOWER_IS_BETTER = ("mae", "perplexity")


def snr_db(reference: ArrayLike, output: ArrayLike) -> float:
    """Signal-to-noise ratio of an output against its reference.

    Args:
        reference: What the output should be; any shape.
        output: Same shape.

    Returns:
        ``10 log10(sum |reference|^2 / sum |reference - output|^2)``, dB;
        infinite where they are equal.
    """
    reference = np.asarray(reference, dtype=np.float64)
    noise = float(np.sum((reference - np.asarray(output, dtype=np.float64)) ** 2))
    signal = float(np.sum(reference**2))
    if noise == 0.0:
        return float("inf")
    return float(10.0 * np.log10(signal / noise)) if signal > 0.0 else float("-inf")


def cosine(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Cosine of corresponding rows; ``[n, dim]`` each, gives ``[n]``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots: NDArray[np.float64] = np.sum(a * b, axis=-1)
    result: NDArray[np.float64] = dots / np.maximum(norms, np.finfo(np.float64).tiny)
    return result


def entity_f1(
    gold: Sequence[Iterable[Span]], predicted: Sequence[Iterable[Span]]
) -> dict[str, float]:
    """Micro-averaged entity precision, recall and F1: boundaries and label must agree.

    Args:
        gold: Spans ``(start, end, label)`` of each text.
        predicted: The same, in the same order.

    Returns:
        ``precision``, ``recall`` and ``f1``, each 0..1; 0 where undefined.
    """
    pairs = [(set(g), set(p)) for g, p in zip(gold, predicted, strict=True)]
    hits = sum(len(g & p) for g, p in pairs)
    found = sum(len(p) for _, p in pairs)
    there = sum(len(g) for g, _ in pairs)
    return {
        "precision": hits / found if found else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (found + there) if found + there else 0.0,
    }
