"""Dominance, fronts and hypervolumes, against the definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.tuning.pareto import dominates, front, hypervolume

WHOLE = st.integers(0, 4).map(float)
POINTS = st.integers(1, 3).flatmap(
    lambda n: st.lists(st.tuples(*[WHOLE] * n), min_size=1, max_size=9)
)


@given(POINTS)
def test_dominance_is_a_strict_partial_order(points: list[tuple[float, ...]]) -> None:
    for a, b, c in itertools.product(points[:4], repeat=3):
        assert not dominates(a, a)
        assert not (dominates(a, b) and dominates(b, a))
        if dominates(a, b) and dominates(b, c):
            assert dominates(a, c)


@given(POINTS)
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, ...]]) -> None:
    kept = front(points)
    best = {p for p in points if not any(dominates(q, p) for q in points)}
    assert {points[i] for i in kept} == best
    assert len(kept) == len(best)
    assert all(points.index(points[i]) == i for i in kept)  # of equal ones the first


@given(POINTS)
def test_the_hypervolume_counts_the_cells_that_are_beaten(
    points: list[tuple[float, ...]],
) -> None:
    reference = [4.0] * len(points[0])
    cells = itertools.product(range(4), repeat=len(reference))
    beaten = sum(
        any(all(x <= c for x, c in zip(p, cell, strict=True)) for p in points)
        for cell in cells
    )
    assert hypervolume(points, reference) == beaten


def test_dominated_points_add_nothing_and_others_do() -> None:
    draw = np.random.default_rng(0)
    points = draw.random((12, 3)).tolist()
    whole = hypervolume(points, [1, 1, 1])
    assert hypervolume([points[i] for i in front(points)], [1, 1, 1]) == pytest.approx(
        whole
    )
    assert hypervolume([*points, [0.01, 0.01, 0.01]], [1, 1, 1]) > whole
