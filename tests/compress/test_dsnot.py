"""DSnoT: parity with the published masks, a slow reference, invariants."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from edgelm.compress.dsnot import (
    Dsnot,
    output_error,
    refine,
    refine_faithful,
    refine_fast,
)
from edgelm.compress.patterns import check_mask, make_mask, parse_pattern
from edgelm.compress.saliency import SALIENCIES
from edgelm.errors import ConfigError
from edgelm.statistics import ActivationStatistics

HERE = Path(__file__).parent.parent / "data" / "dsnot"
FIXTURES = sorted(
    Path(os.environ.get("EDGELM_DSNOT_FIXTURES", HERE)).glob("*.safetensors")
)


def load_fixture(path: Path) -> dict[str, Any]:
    """A fixture with its parameters translated to per-token units."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    inputs = tensors["inputs"]
    sequences, length, _ = inputs.shape
    statistics = ActivationStatistics.of(inputs, torch.ones(sequences, length))
    text = about["sparsity"] if about["pattern"] == "None" else about["pattern"]
    pattern = parse_pattern(text)
    saliency = SALIENCIES[about["initial_method"]](tensors["weight"], statistics)
    return {
        "weight": tensors["weight"],
        "initial": make_mask(saliency, pattern),
        "saliency": saliency,
        "statistics": statistics,
        "pattern": pattern,
        "config": Dsnot(
            max_cycles=int(about["max_cycles"]),
            update_threshold=float(about["update_threshold"]) / length,
            variance_power=float(about["pow_of_var_regrowing"]),
            keep_sign=about["without_same_sign"] != "True",
        ),
        "keep": tensors["keep"].bool(),
        "keep_initial": tensors["keep_initial"].bool()
        if "keep_initial" in tensors
        else None,
    }


def arguments(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        case[k]
        for k in ("weight", "initial", "saliency", "statistics", "pattern", "config")
    )


def test_there_are_fixtures() -> None:
    assert FIXTURES


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_faithful_gives_the_published_mask(path: Path) -> None:
    case = load_fixture(path)
    if case["keep_initial"] is not None:
        assert (case["initial"] == case["keep_initial"]).float().mean() >= 0.999
    found = refine_faithful(*arguments(case))
    assert (found == case["keep"]).float().mean() >= 0.999
    assert torch.equal(found.sum(dim=1), case["keep"].sum(dim=1))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fast_keeps_the_pattern_and_never_raises_the_error(path: Path) -> None:
    case = load_fixture(path)
    found = refine(*arguments(case))
    check_mask(found, case["pattern"])
    before = output_error(case["weight"], case["initial"], case["statistics"]).abs()
    after = output_error(case["weight"], found, case["statistics"]).abs()
    assert bool((after <= before + 1e-6).all())
    assert after.mean() < 0.3 * before.mean()


def slow_dsnot(
    weight: np.ndarray,
    keep: np.ndarray,
    saliency: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    norm: np.ndarray,
    group: int,
    config: Dsnot,
) -> np.ndarray:
    """The cycles of one row after the other, in plain Python."""
    keep = keep.copy()
    for row in range(len(weight)):
        c = weight[row] * mean
        pruned = [j for j in range(len(c)) if not keep[row, j]]
        error = float(sum(c[j] for j in pruned))
        first_sign = np.sign(error)
        growth = {
            j: 0.0 if c[j] == 0 else c[j] / variance[j] ** config.variance_power
            for j in pruned
        }
        positive = sorted(
            (j for j in pruned if growth[j] > 0), key=lambda j: -growth[j]
        )
        negative = sorted((j for j in pruned if growth[j] < 0), key=lambda j: growth[j])
        metric = np.abs(weight[row]) * norm
        kept = [j for j in range(len(c)) if keep[row, j]]
        for _ in range(config.max_cycles):
            if abs(error) <= config.update_threshold:
                break
            candidates = positive if error > 0 else negative
            if not candidates:
                break
            grow = candidates.pop(0)
            if group:
                choice = [j for j in kept if j // group == grow // group]
                choice.sort(key=lambda j: saliency[row, j])
                if not choice:
                    continue
            else:
                choice = [j for j in kept if (c[j] > 0 if error < 0 else c[j] < 0)]
                choice.sort(key=lambda j: metric[j])
                if not choice:
                    break
            prune = choice[0]
            after = error + c[prune] - c[grow]
            if (group or config.keep_sign) and np.sign(after) != first_sign:
                break
            keep[row, grow], keep[row, prune] = True, False
            kept.remove(prune)
            error = after
    return keep


def random_case(
    seed: int, rows: int, width: int, pattern: str, config: Dsnot
) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(rows, width))
    inputs = draw.normal(size=(3, 5, width)) * draw.gamma(2, 1, width) + draw.normal(
        size=width
    )
    statistics = ActivationStatistics.of(torch.tensor(inputs), torch.ones(3, 5))
    # Statistics and weights in float64, so that both sides decide near-ties alike.
    statistics.mean = statistics.mean.double()
    statistics.within = statistics.within.double()
    statistics.scatter = statistics.scatter.double()
    tensor = torch.tensor(weight)
    parsed = parse_pattern(pattern)
    saliency = SALIENCIES["wanda"](tensor, statistics)
    return {
        "weight": tensor,
        "initial": make_mask(saliency, parsed),
        "saliency": saliency,
        "statistics": statistics,
        "pattern": parsed,
        "config": config,
    }


PATTERNS = ["0.5", "0.25", "0.8", "2:4", "1:4", "3:4", "4:8"]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    groups=st.integers(1, 6),
    pattern=st.sampled_from(PATTERNS),
    cycles=st.integers(1, 60),
    threshold=st.sampled_from([0.0, 0.01, 0.3]),
    power=st.sampled_from([0.0, 0.5, 1.0]),
    keep_sign=st.booleans(),
)
def test_faithful_equals_the_slow_reference(
    seed: int,
    rows: int,
    groups: int,
    pattern: str,
    cycles: int,
    threshold: float,
    power: float,
    keep_sign: bool,
) -> None:
    """Small widths, so that rows and groups do run out of candidates."""
    config = Dsnot(cycles, threshold, power, keep_sign)
    case = random_case(seed, rows, 8 * groups, pattern, config)
    found = refine_faithful(*arguments(case))
    check_mask(found, case["pattern"])
    s = case["statistics"]
    due = slow_dsnot(
        case["weight"].numpy(),
        case["initial"].numpy(),
        case["saliency"].numpy(),
        s.mean.numpy(),
        s.within_variance.numpy(),
        s.second_moment.sqrt().numpy(),
        case["pattern"].group,
        config,
    )
    assert np.array_equal(found.numpy(), due)


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 4),
    groups=st.integers(1, 6),
    pattern=st.sampled_from(PATTERNS),
    cycles=st.integers(1, 60),
    keep_sign=st.booleans(),
)
def test_fast_is_exactly_sparse_and_never_raises_the_error(
    seed: int, rows: int, groups: int, pattern: str, cycles: int, keep_sign: bool
) -> None:
    case = random_case(
        seed, rows, 8 * groups, pattern, Dsnot(cycles, keep_sign=keep_sign)
    )
    found = refine(*arguments(case))
    check_mask(found, case["pattern"])
    before = output_error(case["weight"], case["initial"], case["statistics"])
    after = output_error(case["weight"], found, case["statistics"])
    assert bool((after.abs() <= before.abs() + 1e-12).all())
    if keep_sign or case["pattern"].group:
        assert bool((after * before >= 0).all())
    assert int((found != case["initial"]).sum(dim=1).max()) <= 2 * cycles


def test_while_the_sign_holds_fast_and_faithful_agree() -> None:
    case = random_case(3, 32, 64, "0.5", Dsnot(50, 0.0, 1.0, keep_sign=True))
    assert torch.equal(refine_fast(*arguments(case)), refine_faithful(*arguments(case)))


@pytest.mark.parametrize("form", [refine_fast, refine_faithful])
def test_dead_and_constant_features(form: Any) -> None:
    """No variance: a dead feature is never grown, a constant one is the best to grow."""
    inputs = torch.randn(2, 6, 8)
    inputs[..., 0] = 0.0
    inputs[..., 1] = 2.0
    weight = torch.tensor([[5.0, 0.01, 1, 1, 1, -1, -1, -1]])
    statistics = ActivationStatistics.of(inputs, torch.ones(2, 6))
    keep = torch.tensor([[False, False, False, False, True, True, True, True]])
    args = (
        weight,
        keep,
        weight.abs(),
        statistics,
        parse_pattern("0.5"),
        Dsnot(50, 0.0),
    )
    found = form(*args)
    check_mask(found, parse_pattern("0.5"))
    assert not bool(found[0, 0])
    before, after = (
        output_error(weight, mask, statistics).abs() for mask in (keep, found)
    )
    assert bool(after <= before) or form is refine_faithful


@pytest.mark.parametrize("form", [refine_fast, refine_faithful])
def test_sparsity_zero_changes_nothing(form: Any) -> None:
    case = random_case(1, 3, 16, "0", Dsnot())
    assert bool(form(*arguments(case)).all())


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_cycles", 0), ("update_threshold", -1.0), ("variance_power", -0.5)],
)
def test_parameters_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"'{field}'"):
        Dsnot(**{field: value})
