"""Rankings: the best of scores, and several scores made one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.errors import InputError

Scaling = Literal["none", "min-max", "z-score", "rank"]


@dataclass(frozen=True)
class Ranked:
    """A place in a ranking.

    Attributes:
        index: Which of the candidates it is.
        score: Its score.
    """

    index: int
    score: float


def rank(scores: ArrayLike, top_k: int | None = None) -> list[Ranked]:
    """Candidates by falling score; of equals the earlier comes first.

    Args:
        scores: float ``[n]``.
        top_k: How many to give; all if not given.

    Raises:
        InputError: ``top_k`` is less than 1, or a score is not a number.
    """
    values = np.asarray(scores, dtype=np.float64)
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1. Got {top_k} instead.")
    if values.ndim != 1 or np.isnan(values).any():
        raise InputError("The scores must be one number a candidate, none of them NaN.")
    order = np.argsort(-values, kind="stable")[:top_k]
    return [Ranked(int(i), float(values[i])) for i in order]


def combine(
    scores: Mapping[str, ArrayLike],
    weights: Mapping[str, float],
    *,
    scaling: Scaling = "min-max",
) -> NDArray[np.float64]:
    """Several scores of the same candidates made one: the weighted mean after scaling.

    Args:
        scores: Name to float ``[n]``.
        weights: Name to weight, of every score that counts; a negative weight is for
            scores of which less is better.
        scaling: ``min-max``: onto 0..1 over the candidates. ``z-score``: mean 0 and
            deviation 1. ``rank``: 1 for the best, 0 for the last, equals the same.
            ``none``: as they are. A score that is the same for all counts for nothing.

    Returns:
        float64 ``[n]``; `rank` puts them in order.

    Raises:
        InputError: A weight is of no score, all weights are 0, the numbers of
            candidates differ, or a score or weight is not finite.
    """
    if scaling not in _SCALINGS:
        raise InputError(
            f"The scaling must be one of {', '.join(_SCALINGS)}. Got {scaling!r} instead."
        )
    missing = [name for name in weights if name not in scores]
    if missing:
        raise InputError(
            f"There is no score {missing[0]!r} to weigh. The scores are: {', '.join(scores)}."
        )
    rows = {name: np.asarray(scores[name], dtype=np.float64) for name in weights}
    if len({row.shape for row in rows.values()}) > 1:
        raise InputError("Every score must have one number a candidate.")
    numbers = [*rows.values(), np.array(list(weights.values()))]
    if not all(np.isfinite(row).all() for row in numbers):
        raise InputError("Scores and weights must be finite numbers.")
    total = sum(abs(weight) for weight in weights.values())
    if not total:
        raise InputError("At least one weight must differ from 0.")
    scale = _SCALINGS[scaling]
    parts = [weights[name] / total * scale(row) for name, row in rows.items()]
    combined: NDArray[np.float64] = np.sum(parts, axis=0)
    return combined


def _min_max(row: NDArray[np.float64]) -> NDArray[np.float64]:
    if not row.size or row.max() == row.min():
        return np.zeros_like(row)
    scaled: NDArray[np.float64] = (row - row.min()) / (row.max() - row.min())
    return scaled


def _z_score(row: NDArray[np.float64]) -> NDArray[np.float64]:
    if not row.size or row.max() == row.min():
        return np.zeros_like(row)
    scaled: NDArray[np.float64] = (row - row.mean()) / row.std()
    return scaled


def _rank(row: NDArray[np.float64]) -> NDArray[np.float64]:
    return _min_max(np.unique(row, return_inverse=True)[1].astype(np.float64))


_SCALINGS: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "none": lambda row: row,
    "min-max": _min_max,
    "z-score": _z_score,
    "rank": _rank,
}
