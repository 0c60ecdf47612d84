"""ActivationStatistics against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.statistics import ActivationStatistics


def reference(inputs: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Moments token by token, float64."""
    width = inputs.shape[-1]
    tokens = [
        (float(w), x)
        for xs, ws in zip(inputs, weights, strict=True)
        for w, x in zip(ws, xs, strict=True)
        if w > 0
    ]
    count = sum(w for w, _ in tokens)
    mean = sum((w * x for w, x in tokens), np.zeros(width)) / count
    covariance = (
        sum(
            (w * np.outer(x - mean, x - mean) for w, x in tokens),
            np.zeros((width, width)),
        )
        / count
    )
    within = np.zeros(width)
    for xs, ws in zip(inputs, weights, strict=True):
        if ws.sum() > 0:
            own = (ws[:, None] * xs).sum(0) / ws.sum()
            within += (ws[:, None] * (xs - own) ** 2).sum(0)
    return {
        "count": count,
        "mean": mean,
        "covariance": covariance,
        "within": within / count,
    }


def check(
    found: ActivationStatistics,
    inputs: np.ndarray,
    weights: np.ndarray,
    rtol: float = 1e-4,
) -> None:
    due = reference(inputs.astype(np.float64), weights.astype(np.float64))
    scale = np.abs(inputs).max() ** 2 + 1e-12
    assert found.count == pytest.approx(due["count"], rel=1e-6)
    assert found.sequences == int((weights.sum(1) > 0).sum())
    np.testing.assert_allclose(
        found.mean, due["mean"], rtol=rtol, atol=rtol * scale**0.5
    )
    np.testing.assert_allclose(
        found.variance, due["covariance"].diagonal(), rtol=rtol, atol=rtol * scale
    )
    np.testing.assert_allclose(
        found.within_variance, due["within"], rtol=rtol, atol=rtol * scale
    )
    np.testing.assert_allclose(
        found.gram(centred=True), due["covariance"], rtol=rtol, atol=rtol * scale
    )
    raw = due["covariance"] + np.outer(due["mean"], due["mean"])
    np.testing.assert_allclose(found.gram(), raw, rtol=rtol, atol=rtol * scale)
    np.testing.assert_allclose(
        found.second_moment, raw.diagonal(), rtol=rtol, atol=rtol * scale
    )


def of(inputs: np.ndarray, weights: np.ndarray) -> ActivationStatistics:
    return ActivationStatistics.of(
        torch.tensor(inputs, dtype=torch.float32),
        torch.tensor(weights, dtype=torch.float32),
        gram=True,
    )


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    sequence=st.integers(1, 7),
    width=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    fractional=st.booleans(),
)
def test_of_equals_token_by_token(
    batch: int, sequence: int, width: int, seed: int, fractional: bool
) -> None:
    draw = np.random.default_rng(seed)
    inputs = draw.normal(2, 3, (batch, sequence, width)).astype(np.float32)
    lengths = draw.integers(1, sequence + 1, batch)
    weights = (np.arange(sequence) < lengths[:, None]).astype(np.float32)
    if fractional:
        weights /= lengths[:, None]
    check(of(inputs, weights), inputs, weights)


@settings(max_examples=60, deadline=None)
@given(
    parts=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    seed=st.integers(0, 10_000),
)
def test_sum_of_parts_equals_the_whole(parts: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    inputs = draw.normal(-5, 2, (sum(parts), 6, 4)).astype(np.float32)
    weights = (draw.random((sum(parts), 6)) < 0.7).astype(np.float32)
    weights[:, 0] = 1
    total = ActivationStatistics.empty(4, gram=True)
    first = 0
    for rows in parts:
        total.add_(of(inputs[first : first + rows], weights[first : first + rows]))
        first += rows
    check(total, inputs, weights)
    half = len(inputs) // 2
    check(
        of(inputs[:half], weights[:half]) + of(inputs[half:], weights[half:]),
        inputs,
        weights,
    )


def test_padding_has_no_influence_even_when_it_is_nan() -> None:
    inputs = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    weights = np.array([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], np.float32)
    padded = inputs.copy()
    padded[weights == 0] = np.nan
    check(of(padded, weights), inputs, weights)


def test_a_batch_of_padding_alone_changes_nothing() -> None:
    inputs = np.random.default_rng(0).normal(size=(1, 4, 3)).astype(np.float32)
    ones = np.ones((1, 4), np.float32)
    total = of(inputs, ones) + of(inputs, np.zeros((1, 4), np.float32))
    check(total, inputs, ones)


def test_a_large_mean_costs_no_digits() -> None:
    draw = np.random.default_rng(1)
    inputs = (draw.normal(0, 1, (8, 50, 3)) + 3000).astype(np.float32)
    weights = np.ones((8, 50), np.float32)
    total = ActivationStatistics.empty(3, gram=True)
    for row in range(8):
        total.add_(of(inputs[row : row + 1], weights[:1]))
    due = reference(inputs.astype(np.float64), weights)
    np.testing.assert_allclose(total.variance, due["covariance"].diagonal(), rtol=2e-4)


def test_many_small_batches_do_not_drown_in_the_total() -> None:
    """Naive float32 sums stop growing at 2^24 times a term; these do not."""
    one = of(np.array([[[1.0], [-1.0]]], np.float32), np.ones((1, 2), np.float32))
    total = of(
        np.array([[[1.0], [-1.0]]], np.float32), np.full((1, 2), 2.0**24, np.float32)
    )
    for _ in range(1000):
        total.add_(one)
    assert float(total._value("scatter")) == 2.0**25 + 2000


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_taken_as_float32(dtype: torch.dtype) -> None:
    inputs = torch.randn(2, 5, 3).to(dtype)
    found = ActivationStatistics.of(inputs, torch.ones(2, 5), gram=True)
    assert found.mean.dtype == torch.float32
    check(found, inputs.float().numpy(), np.ones((2, 5), np.float32))


def test_without_gram_asking_for_it_says_so() -> None:
    found = ActivationStatistics.of(torch.randn(1, 3, 2), torch.ones(1, 3))
    with pytest.raises(ValueError, match="without the Gram"):
        found.gram()


@settings(max_examples=40, deadline=None)
@given(
    parts=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    outputs=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
def test_drift_equals_numpy(parts: list[int], outputs: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    rows = sum(parts)
    inputs = draw.normal(-3, 2, (rows, 5, 4)).astype(np.float32)
    drift = draw.normal(1, 2, (rows, 5, outputs)).astype(np.float32)
    weights = draw.random((rows, 5)).astype(np.float32)
    weights[:, 3:] *= draw.random() < 0.5
    ends = np.cumsum(parts)[:-1]
    found = [
        ActivationStatistics.of(
            torch.tensor(x), torch.tensor(w), gram=True, drift=torch.tensor(d)
        )
        for x, w, d in zip(
            *(np.split(a, ends) for a in (inputs, weights, drift)), strict=True
        )
    ]
    w = (weights / weights.sum(dtype=np.float64)).astype(np.float64)
    mean, moved = (np.einsum("bt,bti->i", w, a) for a in (inputs, drift))
    covariance = np.einsum("bt,bto,bti->oi", w, drift - moved, inputs - mean)
    variance = np.einsum("bt,bto->o", w, (drift - moved) ** 2)

    one = ActivationStatistics.empty(4, gram=True, outputs=outputs)
    for part in found:
        one.add_(part)
    np.testing.assert_allclose(one.drift(centred=True), covariance, atol=2e-4)
    np.testing.assert_allclose(
        one.drift(), covariance + np.outer(moved, mean), atol=2e-4
    )
    np.testing.assert_allclose(one.drift_variance, variance, atol=2e-4)
    some = one.of_outputs(slice(0, 1))
    np.testing.assert_allclose(some.drift(centred=True), covariance[:1], atol=2e-4)
    assert some.cross is one.cross
