"""Which points no other beats. All coordinates are losses: less is better."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Point = Sequence[float]


def dominates(a: Point, b: Point) -> bool:
    """Whether a is nowhere worse than b, and better somewhere."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def front(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other dominates; of equal ones the first."""
    kept: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (tuple(points[i]), i)):
        # In this order only one that is already there can dominate the next.
        if not any(
            dominates(points[k], points[i]) or tuple(points[k]) == tuple(points[i])
            for k in kept
        ):
            kept.append(i)
    return sorted(kept)


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """What lies between points and a reference that is worse than they: the more, the better.

    By slicing along the last axis; meant for tens of points.

    Args:
        points: Points of any number of axes.
        reference: A point; what is not better than it in every axis counts nothing.
    """
    inside = [
        p for p in points if all(x < r for x, r in zip(p, reference, strict=True))
    ]
    if not inside:
        return 0.0
    if len(reference) == 1:
        return reference[0] - min(p[0] for p in inside)
    if len(reference) == 2:
        volume, top = 0.0, reference[1]
        for x, y in sorted((p[0], p[1]) for p in inside):
            volume += (reference[0] - x) * max(top - y, 0.0)
            top = min(top, y)
        return volume
    heights = sorted({p[-1] for p in inside})
    volume = 0.0
    for low, high in pairwise([*heights, reference[-1]]):
        base = [p[:-1] for p in inside if p[-1] <= low]
        volume += (high - low) * hypervolume(base, reference[:-1])
    return volume
