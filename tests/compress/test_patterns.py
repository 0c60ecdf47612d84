"""Patterns and masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.compress.patterns import (
    check_mask,
    check_width,
    make_mask,
    parse_pattern,
    pruned_per_row,
)
from edgelm.errors import CompressionError, ConfigError


@pytest.mark.parametrize(
    ("text", "sparsity", "n_keep", "group"),
    [
        (0.5, 0.5, 0, 0),
        ("0.7", 0.7, 0, 0),
        (0, 0.0, 0, 0),
        ("2:4", 0.5, 2, 4),
        ("1:4", 0.75, 1, 4),
        ("4:4", 0.0, 4, 4),
    ],
)
def test_parse(text: float | str, sparsity: float, n_keep: int, group: int) -> None:
    pattern = parse_pattern(text)
    assert (pattern.sparsity, pattern.n_keep, pattern.group) == (
        sparsity,
        n_keep,
        group,
    )
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", [1.5, 1, -0.1, "nan", "5:4", "0:4", "half", "2:4:8", ""]
)
def test_parse_refuses(text: float | str) -> None:
    with pytest.raises(ConfigError, match=r"Got"):
        parse_pattern(text)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 6),
    n_keep=st.integers(1, 8),
    group=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_groups_keep_the_most_salient(
    rows: int, groups: int, n_keep: int, group: int, seed: int
) -> None:
    n_keep = min(n_keep, group)
    pattern = parse_pattern(f"{n_keep}:{group}")
    saliency = (
        np.random.default_rng(seed).permutation(rows * groups * group).reshape(rows, -1)
    )
    keep = make_mask(torch.tensor(saliency, dtype=torch.float32), pattern)
    check_mask(keep, pattern)
    for row in range(rows):
        for first in range(0, groups * group, group):
            cells = slice(first, first + group)
            kept = saliency[row, cells][keep[row, cells].numpy()]
            assert set(kept) == set(np.sort(saliency[row, cells])[group - n_keep :])


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 40),
    sparsity=st.floats(0, 0.99),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_rows_keep_the_most_salient(
    rows: int, width: int, sparsity: float, seed: int, ties: bool
) -> None:
    pattern = parse_pattern(sparsity)
    draw = np.random.default_rng(seed)
    saliency = (
        draw.integers(0, 3, (rows, width)) if ties else draw.random((rows, width))
    )
    keep = make_mask(torch.tensor(saliency, dtype=torch.float64), pattern).numpy()
    for row in range(rows):
        pruned = saliency[row][~keep[row]]
        assert len(pruned) == pruned_per_row(pattern, width)
        assert pruned.max(initial=-1) <= saliency[row][keep[row]].min(initial=9)


def test_a_fraction_is_rounded_down_but_not_by_float_noise() -> None:
    assert pruned_per_row(parse_pattern(0.57), 100) == 57  # 0.57 * 100 is 56.99...
    assert pruned_per_row(parse_pattern(0.5), 7) == 3
    assert pruned_per_row(parse_pattern("2:4"), 12) == 6


def test_a_width_that_does_not_divide_is_named() -> None:
    with pytest.raises(
        CompressionError, match=r"multiple of 4 inputs; some\.layer has 30"
    ):
        check_width(parse_pattern("3:4"), 30, "some.layer")
    check_width(parse_pattern("0.5"), 31, "any")


def test_check_mask_sees_one_wrong_entry() -> None:
    pattern = parse_pattern("2:4")
    keep = make_mask(torch.rand(3, 8), pattern)
    keep[1, 0] = ~keep[1, 0]
    with pytest.raises(CompressionError, match="2:4"):
        check_mask(keep, pattern)
