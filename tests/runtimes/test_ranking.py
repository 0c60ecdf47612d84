"""Rankings and combined scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import InputError
from edgelm.runtimes.ranking import combine, rank

SCORES = st.lists(st.integers(-3, 3).map(float), max_size=30)


@settings(max_examples=100, deadline=None)
@given(scores=SCORES, top_k=st.integers(1, 40))
def test_the_best_first_and_of_equals_the_earlier(
    scores: list[float], top_k: int
) -> None:
    due = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:top_k]
    found = rank(scores, top_k)
    assert [place.index for place in found] == due
    assert [place.score for place in found] == [scores[i] for i in due]


def test_weights_and_scalings() -> None:
    scores = {
        "match": [0.0, 5.0, 10.0],
        "age": [100.0, 300.0, 200.0],
        "same": [7.0] * 3,
    }
    weights = {"match": 3.0, "age": -1.0, "same": 4.0}
    np.testing.assert_allclose(
        combine(scores, weights), [0, (1.5 - 1) / 8, (3 - 0.5) / 8]
    )
    np.testing.assert_allclose(
        combine(scores, {"match": 1.0}, scaling="none"), [0, 5, 10]
    )
    ranks = combine({"x": [5.0, 5.0, 9.0, 1.0]}, {"x": 2.0}, scaling="rank")
    np.testing.assert_allclose(ranks, [0.5, 0.5, 1, 0])
    z = combine(scores, {"match": 1.0}, scaling="z-score")
    np.testing.assert_allclose([z.mean(), z.std()], [0, 1], atol=1e-12)
    assert combine({"x": []}, {"x": 1.0}).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 999), scaling=st.sampled_from(["min-max", "z-score", "rank"])
)
def test_units_do_not_matter(seed: int, scaling: Any) -> None:
    draw = np.random.default_rng(seed)
    a, b = draw.normal(size=(2, 9))
    weights = {"a": 0.7, "b": 0.3}
    np.testing.assert_allclose(
        combine({"a": a, "b": b}, weights, scaling=scaling),
        combine({"a": 1000 * a - 5, "b": b / 3}, weights, scaling=scaling),
        atol=1e-9,
    )


@pytest.mark.parametrize(
    ("scores", "weights", "options", "message"),
    [
        ({"a": [1.0]}, {"b": 1.0}, {}, "no score 'b' to weigh. The scores are: a"),
        ({"a": [1.0], "b": [1.0, 2.0]}, {"a": 1, "b": 1}, {}, "one number a candidate"),
        ({"a": [np.nan]}, {"a": 1.0}, {}, "finite"),
        ({"a": [1.0]}, {"a": 0.0}, {}, "differ from 0"),
        ({"a": [1.0]}, {"a": 1.0}, {"scaling": "log"}, "must be one of none, min-max"),
    ],
)
def test_what_cannot_be_combined(
    scores: Any, weights: Any, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        combine(scores, weights, **options)


def test_what_cannot_be_ranked() -> None:
    with pytest.raises(InputError, match="top_k must be at least 1"):
        rank([1.0], 0)
    with pytest.raises(InputError, match="none of them NaN"):
        rank([1.0, np.nan])
