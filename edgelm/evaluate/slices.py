"""Where a model is good and where not: by length, by label, by domain; and where two differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.evaluate import measures
from edgelm.evaluate.accuracy import Judged
from edgelm.evaluate.bootstrap import RESAMPLES, SEED, interval, resample
from edgelm.evaluate.data import Row
from edgelm.evaluate.measures import Measure

# Words of a text, up to.
_LENGTHS = (8, 16, 32, 64, 128, 256)
# A correlation or an average of fewer says nothing.
_LEAST = 5


@dataclass(frozen=True)
class Slice:
    """A part of the data, or one label.

    Attributes:
        by: ``length``, ``label`` or ``domain``.
        name: Which.
        units: How many units it holds; for a label, those of all the data.
        measure: What was measured.
        value: Of the model.
        interval: Of the value.
        against: Of the model it is compared with.
        difference: Interval of the difference; None where there is no other.
    """

    by: str
    name: str
    units: int
    measure: str
    value: float
    interval: tuple[float, float]
    against: float | None = None
    difference: tuple[float, float] | None = None


def slices(
    judged: Judged,
    other: Judged | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Slice]:
    """Every slice of the data that has enough units, and every label.

    Args:
        judged: A model on the data.
        other: Another on the same.
        resamples: Draws of the bootstrap.
        seed: Of the draws.
    """
    main, units = judged.main, len(judged.units)
    rival = None if other is None else other.measures[main]
    parts = [("length", name, places) for name, places in by_length(judged.units)]
    parts += [("domain", name, places) for name, places in _by_domain(judged)]
    jobs: list[tuple[str, str, Any, Measure, Measure | None, str]] = [
        (by, name, places, judged.measures[main], rival, main)
        for by, name, places in parts
        if len(places) >= _LEAST
    ]
    everything = np.arange(units)
    of_label = "f1" if main in ("f1", "accuracy") else main
    for name, measure in judged.by_label.items():
        against = None if other is None else other.by_label.get(name, _nothing)
        jobs.append(("label", name, everything, measure, against, of_label))
    found = []
    for by, name, places, measure, against, what in jobs:
        both = {"model": measure} | ({} if against is None else {"against": against})
        drawn = resample(both, units, resamples=resamples, seed=seed, among=places)
        counts = np.zeros((1, units))
        counts[:, places] = 1
        found.append(
            Slice(
                by,
                name,
                len(places),
                what,
                float(measure(counts)[0]),
                interval(drawn["model"]),
                None if against is None else float(against(counts)[0]),
                None
                if against is None
                else interval(drawn["model"] - drawn["against"]),
            )
        )
    return found


def _nothing(counts: measures.Floats) -> measures.Floats:
    """F1 of a label that one model never gave, and that is not in the data."""
    return np.full(len(counts), np.nan)


def by_length(units: Sequence[str]) -> list[tuple[str, NDArray[np.int64]]]:
    """Places of the units by their number of words."""
    words = np.array([len(unit.split()) for unit in units])
    bounds = (0, *_LENGTHS)
    found = [
        (f"{low + 1} to {high} words", np.flatnonzero((words > low) & (words <= high)))
        for low, high in pairwise(bounds)
    ]
    found[0] = (f"up to {_LENGTHS[0]} words", np.flatnonzero(words <= _LENGTHS[0]))
    found.append(
        (f"more than {_LENGTHS[-1]} words", np.flatnonzero(words > _LENGTHS[-1]))
    )
    return found


def _by_domain(judged: Judged) -> list[tuple[str, NDArray[np.int64]]]:
    domains = np.array([str(row.get("domain", "")) for row in judged.rows])
    return [(n, np.flatnonzero(domains == n)) for n in sorted(set(domains)) if n]


@dataclass(frozen=True)
class Disagreement:
    """A unit whose answer changed.

    Attributes:
        unit: The text, pair or query.
        change: How far the answers are apart, by the task: entities that only one of the
            models found; share of the ten best that changed; difference of the scores.
        model: What the model said.
        against: What the other said.
        gold: What the data says.
    """

    unit: str
    change: float
    model: Any
    against: Any
    gold: Any


def disagreements(judged: Judged, other: Judged, most: int = 10) -> list[Disagreement]:
    """The units whose answers changed most, the largest change first."""
    changes = np.array(
        [
            judged.change(a, b)
            for a, b in zip(judged.answers, other.answers, strict=True)
        ]
    )
    order = np.argsort(-changes, kind="stable")[:most]
    return [
        Disagreement(
            judged.units[i],
            float(changes[i]),
            judged.answers[i],
            other.answers[i],
            _gold(judged.rows[i]),
        )
        for i in order.tolist()
        if changes[i] > 0
    ]


def _gold(row: Row) -> Any:
    return next((row[k] for k in ("score", "label", "entities") if k in row), None)
