"""Measures as functions of how often each unit counts.

A unit is what is resampled: a text, a pair, a query, a window of a long text. A measure
takes ``counts``, float64 ``[resamples, units]``, and gives float64 ``[resamples]``; a row of
ones is the data itself, a row of a bootstrap says how often each unit was drawn, and a row
of zeros and ones is a slice. So one function gives the value, its interval and its slices,
without a loop. Where a measure is not defined it is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.metrics import Span

Floats = NDArray[np.float64]
Measure = Callable[[Floats], Floats]


def value(measure: Measure, units: int) -> float:
    """A measure of the data itself."""
    return float(measure(np.ones((1, units)))[0])


def ratio(above: ArrayLike, below: ArrayLike, scale: float = 1.0) -> Measure:
    """``scale`` times a sum over the units by another; ``[units]`` each."""
    over, under = np.asarray(above, np.float64), np.asarray(below, np.float64)

    def measure(counts: Floats) -> Floats:
        return scale * _divide(counts @ over, counts @ under)

    return measure


def mean(values: ArrayLike, scale: float = 1.0) -> Measure:
    """``scale`` times the mean over the units."""
    array = np.asarray(values, np.float64)
    return ratio(array, np.ones_like(array), scale)


def perplexity(losses: ArrayLike, tokens: ArrayLike) -> Measure:
    """``exp`` of the mean loss a token, of the losses' sums and numbers of tokens."""
    a_token = ratio(losses, tokens)
    return lambda counts: np.exp(a_token(counts))


def entities(
    gold: Sequence[set[Span]], found: Sequence[set[Span]]
) -> tuple[dict[str, Measure], dict[str, Measure]]:
    """Entity F1, precision and recall in percent, micro-averaged, and F1 by type.

    Args:
        gold: Spans of each text; boundaries and type must agree.
        found: The same of a model.

    Returns:
        The measures, and F1 by type.
    """

    def sums(kind: str | None) -> tuple[list[int], list[int], list[int]]:
        def of(spans: set[Span]) -> int:
            return sum(kind in (None, label) for _, _, label in spans)

        hits = [of(g & f) for g, f in zip(gold, found, strict=True)]
        return hits, [of(f) for f in found], [of(g) for g in gold]

    def f1(kind: str | None) -> Measure:
        hits, said, there = sums(kind)
        return ratio(hits, np.add(said, there), 200.0)

    hits, said, there = sums(None)
    kinds = sorted({label for spans in (*gold, *found) for _, _, label in spans})
    micro = {
        "f1": f1(None),
        "precision": ratio(hits, said, 100.0),
        "recall": ratio(hits, there, 100.0),
    }
    # Where a quotient has no meaning, nothing was found or there: 0, as seqeval has it.
    return (
        {name: _zero(measure) for name, measure in micro.items()},
        {kind: f1(kind) for kind in kinds},
    )


def classes(
    gold: Sequence[str], found: Sequence[str]
) -> tuple[dict[str, Measure], dict[str, Measure]]:
    """Accuracy and macro-averaged F1 in percent, and F1 by class.

    A class that is neither there nor said in a resample is left out of its mean.
    """
    a, b = np.asarray(gold), np.asarray(found)
    names = sorted({*gold, *found})
    by_class = {
        name: ratio(
            (a == name) & (b == name), (a == name).astype(int) + (b == name), 200.0
        )
        for name in names
    }

    def macro(counts: Floats) -> Floats:
        each = np.stack([measure(counts) for measure in by_class.values()])
        there = np.isfinite(each)
        return _divide(np.where(there, each, 0.0).sum(axis=0), there.sum(axis=0))

    return {"accuracy": mean(a == b, 100.0), "macro-f1": macro}, by_class


def correlations(x: ArrayLike, y: ArrayLike) -> dict[str, Measure]:
    """Spearman's and Pearson's correlation, times 100."""
    return {"spearman": spearman(x, y), "pearson": pearson(x, y)}


def pearson(x: ArrayLike, y: ArrayLike) -> Measure:
    """Pearson's correlation, times 100; NaN where one side is constant."""
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)

    def measure(counts: Floats) -> Floats:
        return _correlate(counts, first[None], second[None])

    return measure


def spearman(x: ArrayLike, y: ArrayLike) -> Measure:
    """Spearman's correlation, times 100: Pearson's of the ranks, equal values sharing theirs.

    The ranks are those within each resample: a value stands behind all smaller ones that
    were drawn, as often as they were.
    """
    ranks = [_ranks(np.asarray(values, np.float64)) for values in (x, y)]

    def measure(counts: Floats) -> Floats:
        return _correlate(counts, *(rank(counts) for rank in ranks))

    return measure


def _ranks(values: Floats) -> Callable[[Floats], Floats]:
    order = np.argsort(values, kind="stable")
    _, starts, places = np.unique(values, return_index=True, return_inverse=True)
    starts = np.searchsorted(values[order], values[starts])

    def rank(counts: Floats) -> Floats:
        drawn = np.add.reduceat(counts[:, order], starts, axis=1)
        before = np.cumsum(drawn, axis=1) - drawn
        ranks: Floats = (before + (drawn + 1) / 2)[:, places]
        return ranks

    return rank


def _correlate(counts: Floats, x: Floats, y: Floats) -> Floats:
    """Weighted correlation of the rows of ``x`` and ``y``, times 100."""
    total = np.maximum(counts.sum(axis=1, keepdims=True), 1e-300)
    size = (counts * x * x).sum(axis=1), (counts * y * y).sum(axis=1)
    x = x - (counts * x).sum(axis=1, keepdims=True) / total
    y = y - (counts * y).sum(axis=1, keepdims=True) / total
    xx, yy = (counts * x * x).sum(axis=1), (counts * y * y).sum(axis=1)
    # What rounding leaves of a constant is no variance.
    flat = (xx <= 1e-24 * size[0]) | (yy <= 1e-24 * size[1])
    spread = np.sqrt(np.where(flat, np.nan, xx * yy))
    values: Floats = 100.0 * (counts * x * y).sum(axis=1) / spread
    return values


def _divide(above: Floats, below: NDArray[np.generic]) -> Floats:
    under = np.asarray(below, np.float64)
    result: Floats = np.where(
        under > 0, above / np.where(under > 0, under, 1.0), np.nan
    )
    return result


def _zero(measure: Measure) -> Measure:
    return lambda counts: np.nan_to_num(measure(counts), nan=0.0)
