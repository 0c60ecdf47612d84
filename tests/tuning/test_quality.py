"""What a model is worth without labels, against slow and obvious references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.tuning.quality import halves, matching


def slow(first: np.ndarray, second: np.ndarray) -> float:
    """Pair by pair."""

    def near(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    won = 0.0
    for i in range(len(first)):
        own = near(first[i], second[i])
        for j in range(len(first)):
            if i != j:
                for other in (near(first[i], second[j]), near(first[j], second[i])):
                    won += (own > other) + (own == other) / 2
    return won / (2 * len(first) * (len(first) - 1))


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(2, 5), st.integers(0, 9))
def test_matching_is_the_area_under_the_curve(n: int, width: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    first, second = draw.standard_normal((2, n, width))
    assert matching(first, second) == pytest.approx(slow(first, second), abs=1e-9)


def test_perfect_and_constant_vectors() -> None:
    vectors = np.eye(5)
    assert matching(vectors, vectors) == 1.0
    assert matching(np.ones((5, 3)), np.ones((5, 3))) == 0.5


def test_texts_are_cut_at_a_word() -> None:
    assert halves("a b c d e f g") == ("a b c", "d e f g")
    assert halves("too short to cut") is None
