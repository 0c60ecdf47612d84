"""Intervals and differences by the bootstrap: how far a value would move with other data.

Units (texts, pairs, queries) are drawn with replacement, as often as there are; what a
measure gives on many such draws spreads as it would on other data of the same kind
(Efron 1979; percentile intervals). Two models are compared on the same draws (paired), so
that what is hard for both does not hide their difference (Berg-Kirkpatrick et al. 2012).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.evaluate.measures import Floats, Measure, value
from edgelm.metrics import LOWER_IS_BETTER

RESAMPLES, SEED, LEVEL = 1000, 0, 0.95
# Counts that are in memory at once: 32 MiB.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Comparison:
    """One model against another on the same units.

    Attributes:
        measure: What was compared.
        value: Of the model.
        against: Of the other.
        difference: The first less the second.
        interval: Of the difference.
        p: Two-sided: twice the share of draws whose difference has the other sign or none,
            at least one of the draws.
        significant: Whether the interval leaves out 0.
    """

    measure: str
    value: float
    against: float
    difference: float
    interval: tuple[float, float]
    p: float
    significant: bool


def draws(
    units: int, resamples: int, seed: int, among: NDArray[np.int64] | None = None
) -> Iterator[Floats]:
    """How often each unit is drawn, float64 ``[some, units]``, ``resamples`` rows in all.

    Args:
        units: How many there are.
        resamples: Draws.
        seed: The same seed gives the same draws.
        among: Places of the units that may be drawn, for a slice; all if not given.
    """
    places = np.arange(units) if among is None else among
    generator = np.random.default_rng(seed)
    shares = np.full(len(places), 1 / max(len(places), 1))
    step = max(1, _CHUNK // max(units, 1))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        counts = np.zeros((rows, units))
        if len(places):
            counts[:, places] = generator.multinomial(len(places), shares, size=rows)
        yield counts


def resample(
    measures: Mapping[str, Measure],
    units: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    among: NDArray[np.int64] | None = None,
) -> dict[str, Floats]:
    """Values of measures on the same draws, float64 ``[resamples]`` each."""
    found: dict[str, list[Floats]] = {name: [] for name in measures}
    for counts in draws(units, resamples, seed, among):
        for name, measure in measures.items():
            found[name].append(measure(counts))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def interval(values: Floats, level: float = LEVEL) -> tuple[float, float]:
    """The middle ``level`` of what was found; draws where a measure has no value are left out."""
    there = values[np.isfinite(values)]
    if not len(there):
        return float("nan"), float("nan")
    low, high = np.quantile(there, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(
    name: str,
    measure: Measure,
    other: Measure,
    units: int,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Compare two models by one measure.

    Args:
        name: Of the measure.
        measure: Of the model.
        other: Of the model it is compared with, over the same units.
        units: How many there are.
        resamples: Draws.
        seed: Of the draws.
    """
    both = {"model": measure, "against": other}
    found = resample(both, units, resamples=resamples, seed=seed)
    differences = found["model"] - found["against"]
    differences = differences[np.isfinite(differences)]
    first, second = value(measure, units), value(other, units)
    low, high = interval(differences)
    count = max(len(differences), 1)
    tail = min((differences <= 0).sum(), (differences >= 0).sum()) / count
    p = min(1.0, max(2 * float(tail), 1 / count))
    return Comparison(
        name, first, second, first - second, (low, high), p, low > 0 or high < 0
    )


def statement(comparison: Comparison, model: str, against: str, data: str) -> str:
    """The comparison in a sentence."""
    c = comparison
    what = f"{c.measure} of {model} on {data} is {c.value:.2f}, of {against} {c.against:.2f}"
    low, high = c.interval
    by = f"difference {c.difference:+.2f}, 95 % interval {low:+.2f} to {high:+.2f}, p = {c.p:.2g}"
    if not c.significant:
        return f"{what}: no significant difference ({by})."
    better = (c.difference > 0) != (c.measure in LOWER_IS_BETTER)
    return f"{what}: significantly {'better' if better else 'worse'} ({by})."
