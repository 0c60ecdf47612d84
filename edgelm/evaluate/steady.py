"""When a model is warm, and what can be said of repeated timings."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# A block of timings, how many blocks must agree, and how well.
BLOCK, BLOCKS, TOLERANCE = 10, 3, 0.05
_MOST_BLOCKS, _MOST_SECONDS = 30, 15.0


@dataclass(frozen=True)
class WarmUp:
    """How a model became warm.

    Attributes:
        calls: How many calls it took.
        steady: Whether the last blocks of calls agreed; else time or patience ran out, and
            what is measured after it may still be changing.
        first_ms: Median of the first block, ms.
        last_ms: Median of the last block, ms.
    """

    calls: int
    steady: bool
    first_ms: float
    last_ms: float


def is_steady(medians: Sequence[float]) -> bool:
    """Whether the last `BLOCKS` medians lie within `TOLERANCE` of their own median."""
    if len(medians) < BLOCKS:
        return False
    last = medians[-BLOCKS:]
    middle = statistics.median(last)
    return all(abs(value - middle) <= TOLERANCE * middle for value in last)


def warm_up(timed: Callable[[int], float]) -> WarmUp:
    """Call something until it is steady, or for at most 300 calls or 15 s.

    Args:
        timed: Takes the number of the call, does it, and gives its ms.
    """
    medians: list[float] = []
    spent = 0.0
    while len(medians) < _MOST_BLOCKS and spent < _MOST_SECONDS * 1e3:
        block = [timed(len(medians) * BLOCK + i) for i in range(BLOCK)]
        medians.append(statistics.median(block))
        spent += sum(block)
        if is_steady(medians):
            break
    return WarmUp(len(medians) * BLOCK, is_steady(medians), medians[0], medians[-1])


def percentile(values: Sequence[float], q: float) -> float:
    """The value at a share of the sorted values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def median_interval(
    values: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """An interval for the median that holds for any distribution, and its confidence.

    Between the k-th smallest and the k-th largest of n values lies the median with
    probability ``1 - 2 P(Binomial(n, 1/2) < k)``; k is the largest that keeps ``level``,
    or 1: six values are the fewest that reach 95 %.

    Args:
        values: At least one.
        level: Confidence that is wanted.

    Returns:
        Lower end, upper end, and the confidence that they have.
    """
    ordered, n = sorted(values), len(values)

    def confidence(k: int) -> float:
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / float(2**n)

    k = max([1, *(k for k in range(1, (n + 1) // 2 + 1) if confidence(k) >= level)])
    return ordered[k - 1], ordered[n - k], max(0.0, confidence(k))
