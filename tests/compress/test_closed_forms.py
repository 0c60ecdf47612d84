"""Saliency, swaps and repair against slow and obvious references."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.compress import admm, obs, swaps
from edgelm.compress.patterns import (
    check_mask,
    make_mask,
    parse_pattern,
    pruned_per_row,
)
from edgelm.compress.saliency import SALIENCIES
from edgelm.errors import ConfigError
from edgelm.statistics import ActivationStatistics


def correlated(seed: int, width: int, tokens: int = 60) -> ActivationStatistics:
    """Statistics of inputs with strong correlations and a mean, float64."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draw, dtype=torch.float64)
    inputs = torch.randn(2, tokens, width, generator=draw, dtype=torch.float64)
    inputs = inputs @ (mixing / width**0.5 + torch.eye(width)) + torch.randn(
        width, generator=draw
    )
    return ActivationStatistics.of(inputs, torch.ones(2, tokens), gram=True)


def weights(seed: int, rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed + 1))


def row_errors(
    weight: torch.Tensor, new: torch.Tensor, gram: torch.Tensor
) -> torch.Tensor:
    change = (weight - new).double()
    return ((change @ gram.double()) * change).sum(dim=1)


def test_ria_by_hand() -> None:
    found = ActivationStatistics.of(torch.tensor([[[4.0, 9.0]]]), torch.ones(1, 1))
    weight = torch.tensor([[1.0, -3.0], [3.0, 0.0]])
    due = torch.tensor(
        [[(1 / 4 + 1 / 4) * 2, (3 / 3 + 3 / 4) * 3], [(3 / 4 + 1) * 2, 0.0]]
    )
    torch.testing.assert_close(SALIENCIES["ria"](weight, found), due)


def test_ria_of_zero_rows_and_columns_is_zero() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    found = SALIENCIES["ria"](weight, correlated(0, 3))
    assert bool(torch.isfinite(found).all())
    assert bool((found[0] == 0).all())
    assert bool((found[:, 1] == 0).all())


def slow_factor(gram: np.ndarray) -> np.ndarray:
    damped = gram + obs.DAMPING * np.diag(gram).mean() * np.eye(len(gram))
    return np.linalg.cholesky(np.linalg.inv(damped)).T


def test_the_cost_of_removal_is_the_error_the_rest_cannot_mend() -> None:
    """For the first column nothing is settled before it: its cost is exactly the
    error that is left when it goes and all the others make up for it."""
    found = correlated(1, 6)
    gram = found.gram().double()
    damped = gram + obs.DAMPING * gram.diagonal().mean() * torch.eye(6)
    weight = weights(1, 3, 6).double()
    cost = obs.removal_cost(weight, found.gram())
    for row in range(3):
        rest = torch.linalg.solve(damped[1:, 1:], damped[1:] @ weight[row])
        new = torch.cat([torch.zeros(1, dtype=torch.float64), rest])
        left = (weight[row] - new) @ damped @ (weight[row] - new)
        assert float(cost[row, 0]) == pytest.approx(float(left), rel=1e-4)


def slow_sparsegpt(
    weight: np.ndarray, gram: np.ndarray, keep: np.ndarray
) -> np.ndarray:
    """One weight at a time, one row at a time."""
    factor = slow_factor(gram)
    w = weight.astype(np.float64).copy()
    for row in range(len(w)):
        for j in range(w.shape[1]):
            if not keep[row, j]:
                error = w[row, j] / factor[j, j]
                w[row, j:] -= error * factor[j, j:]
                w[row, j] = 0.0
    return w


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    groups=st.integers(1, 40),
    pattern=st.sampled_from(["0.5", "0.7", "2:4", "1:4"]),
)
def test_sparsegpt_under_a_mask_equals_one_weight_at_a_time(
    seed: int, rows: int, groups: int, pattern: str
) -> None:
    """Up to 160 columns, so that errors cross the blocks of 128."""
    width = 4 * groups
    gram = correlated(seed, width).gram()
    weight = weights(seed, rows, width)
    parsed = parse_pattern(pattern)
    keep = make_mask(weight.abs(), parsed)
    found = obs.prune(weight, gram, parsed, keep)[0]
    due = slow_sparsegpt(weight.numpy(), gram.double().numpy(), keep.numpy())
    np.testing.assert_allclose(found, due, rtol=2e-3, atol=2e-4)
    assert bool((found[~keep] == 0).all())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 4),
    groups=st.integers(1, 40),
    pattern=st.sampled_from(["0.5", "0.37", "0.9", "2:4", "1:4", "3:4"]),
)
def test_sparsegpt_that_chooses_its_mask_is_exactly_sparse(
    seed: int, rows: int, groups: int, pattern: str
) -> None:
    width = 4 * groups
    gram = correlated(seed, width).gram()
    weight = weights(seed, rows, width)
    parsed = parse_pattern(pattern)
    new, keep = obs.prune(weight, gram, parsed)
    check_mask(keep, parsed)
    again = obs.prune(weight, gram, parsed, keep)[0]
    torch.testing.assert_close(new, again, rtol=1e-4, atol=1e-5)


def least_squares(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor
) -> torch.Tensor:
    """The optimum on the support, row by row."""
    new = torch.zeros_like(weight, dtype=torch.float64)
    for row in range(len(weight)):
        kept = keep[row].nonzero().squeeze(1)
        target = gram[kept] @ weight[row].double()
        new[row, kept] = torch.linalg.solve(gram[kept][:, kept], target)
    return new


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), pattern=st.sampled_from(["0.5", "0.8", "2:4"]))
def test_admm_reaches_least_squares_on_the_support(seed: int, pattern: str) -> None:
    width = 16
    gram = correlated(seed, width).gram().double()
    weight = weights(seed, 4, width)
    keep = make_mask(weight.abs(), parse_pattern(pattern))
    config = admm.Admm(iterations=3000, damping=0.0)
    found = admm.repair(weight, keep, gram, config)
    best = row_errors(weight, least_squares(weight, keep, gram), gram)
    reached = row_errors(weight, found, gram)
    assert bool((found[~keep] == 0).all())
    assert bool((reached <= best * 1.02 + 1e-6).all())
    plain = row_errors(weight, weight * keep, gram)
    few = row_errors(weight, admm.repair(weight, keep, gram, admm.Admm()), gram)
    assert float(few.sum()) < float(plain.sum())


@pytest.mark.parametrize("pattern", ["0", "0.5", "0.7", "2:4", "1:8", "4:4"])
def test_admms_mask_is_that_of_magnitude_where_inputs_are_independent(
    pattern: str,
) -> None:
    parsed = parse_pattern(pattern)
    weight = weights(1, 5, 24)
    config = admm.Admm(damping=0.0)
    found = admm.refine(weight, torch.eye(24), parsed, config)
    assert torch.equal(found, make_mask(weight.abs(), parsed))


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    pattern=st.sampled_from(["0.5", "0.7", "2:4", "1:4"]),
)
def test_admms_mask_is_better_once_the_weights_are_solved_for(
    seed: int, pattern: str
) -> None:
    """Against Wanda's, both by exact least squares, over all rows."""
    parsed = parse_pattern(pattern)
    gram = correlated(seed, 32).gram().double()
    weight = weights(seed, 8, 32)
    found = admm.refine(weight, gram, parsed, admm.Admm())
    check_mask(found, parsed)
    plain = make_mask(weight.abs() * gram.diagonal().sqrt(), parsed)
    reached, before = (
        row_errors(weight, least_squares(weight, keep, gram), gram).sum()
        for keep in (found, plain)
    )
    assert float(reached) <= float(before)


def slow_swaps(
    weight: np.ndarray, keep: np.ndarray, gram: np.ndarray, group: int, max_swaps: int
) -> np.ndarray:
    """The best of all swaps by the full error, again and again."""
    keep = keep.copy()

    def error(row: int, mask: np.ndarray) -> float:
        pruned = weight[row] * ~mask
        return float(pruned @ gram @ pruned)

    for row in range(len(weight)):
        for _ in range(max_swaps):
            now = error(row, keep[row])
            best, choice = now * (1 - 1e-5), None
            kept, gone = np.flatnonzero(keep[row]), np.flatnonzero(~keep[row])
            for p, g in itertools.product(kept, gone):
                if group and p // group != g // group:
                    continue
                mask = keep[row].copy()
                mask[p], mask[g] = False, True
                if (e := error(row, mask)) < best:
                    best, choice = e, (p, g)
            if choice is None:
                break
            keep[row, choice[0]], keep[row, choice[1]] = False, True
    return keep


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    groups=st.integers(1, 4),
    pattern=st.sampled_from(["0.5", "0.25", "2:4", "1:4", "3:4"]),
    max_swaps=st.integers(1, 12),
)
def test_swaps_are_the_best_of_all_swaps(
    seed: int, rows: int, groups: int, pattern: str, max_swaps: int
) -> None:
    """As narrow as the shortlist is long, so that it leaves nothing out."""
    width = 4 * groups
    gram = correlated(seed, width).gram().double()
    weight = weights(seed, rows, width).double()
    parsed = parse_pattern(pattern)
    keep = make_mask(weight.abs(), parsed)
    found = swaps.refine(weight, keep, gram, parsed, swaps.Swaps(max_swaps))
    check_mask(found, parsed)
    due = slow_swaps(
        weight.numpy(), keep.numpy(), gram.numpy(), parsed.group, max_swaps
    )
    reached = row_errors(weight, weight * found, gram)
    best = row_errors(weight, weight * torch.tensor(due), gram)
    torch.testing.assert_close(reached, best, rtol=1e-6, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 600),
    pattern=st.sampled_from(["0.5", "0.7", "2:4", "4:8"]),
)
def test_swaps_never_raise_a_rows_error(seed: int, rows: int, pattern: str) -> None:
    """Wider than the shortlist, and more rows than go at a time."""
    gram = correlated(seed, 48).gram()
    weight = weights(seed, rows, 48)
    parsed = parse_pattern(pattern)
    keep = make_mask(weight.abs(), parsed)
    found = swaps.refine(weight, keep, gram, parsed, swaps.Swaps(30))
    check_mask(found, parsed)
    before = row_errors(weight, weight * keep, gram)
    after = row_errors(weight, weight * found, gram)
    assert bool((after <= before * (1 + 1e-4) + 1e-6).all())
    if rows > 8:  # of few rows, none may have a swap that helps
        assert float(after.sum()) < float(before.sum())


def test_swaps_on_the_mean_alone_lower_dsnots_error() -> None:
    """The rank-one Gram matrix of the mean is DSnoT's objective."""
    mean = torch.randn(24).double()
    weight = torch.randn(5, 24).double()
    pattern = parse_pattern("0.5")
    keep = make_mask(weight.abs(), pattern)
    found = swaps.refine(
        weight, keep, torch.outer(mean, mean), pattern, swaps.Swaps(50)
    )
    before, after = (((weight * ~mask) @ mean).abs() for mask in (keep, found))
    assert bool((after <= before + 1e-9).all())
    assert float(after.mean()) < 0.1 * float(before.mean())


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
def test_singular_and_dead_inputs_give_finite_results(pattern: str) -> None:
    """Fewer tokens than features, a dead and a constant feature, a row of zeros."""
    inputs = torch.randn(1, 3, 16)
    inputs[..., 0], inputs[..., 1] = 0.0, 1.0
    found = ActivationStatistics.of(inputs, torch.ones(1, 3), gram=True)
    weight = torch.randn(4, 16)
    weight[2] = 0.0
    parsed = parse_pattern(pattern)
    for centred in (True, False):
        gram = found.gram(centred=centred)
        for name, saliency in SALIENCIES.items():
            keep = make_mask(saliency(weight, found), parsed)
            check_mask(keep, parsed)
            keep = swaps.refine(weight, keep, gram, parsed, swaps.Swaps())
            check_mask(keep, parsed)
            for new in (
                admm.repair(weight, keep, gram, admm.Admm()),
                obs.prune(weight, gram, parsed, keep)[0],
                obs.prune(weight, gram, parsed)[0],
            ):
                assert bool(torch.isfinite(new).all()), name
                assert bool((new[2] == 0).all()), name


def test_no_input_at_all() -> None:
    """Every token padding, or an input that is always zero."""
    zero = torch.zeros(8, 8)
    weight, pattern = torch.randn(3, 8), parse_pattern("2:4")
    keep = make_mask(weight.abs(), pattern)
    assert torch.equal(swaps.refine(weight, keep, zero, pattern, swaps.Swaps()), keep)
    for new in (
        admm.repair(weight, keep, zero, admm.Admm()),
        obs.prune(weight, zero, pattern, keep)[0],
    ):
        assert bool(torch.isfinite(new).all())


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (swaps.Swaps, "max_swaps", 0),
        (swaps.Swaps, "min_gain", -1.0),
        (admm.Admm, "iterations", 0),
        (admm.Admm, "ramp", 0),
        (admm.Admm, "damping", -0.1),
        (admm.Admm, "rho", 0.0),
    ],
)
def test_parameters_out_of_range_are_named(
    make: type, field: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=f"'{field}'"):
        make(**{field: value})


def test_pruned_per_row_is_what_obs_prunes() -> None:
    pattern = parse_pattern(0.37)
    keep = obs.prune(torch.randn(2, 300), torch.eye(300), pattern)[1]
    assert (~keep).sum(dim=1).tolist() == [pruned_per_row(pattern, 300)] * 2
