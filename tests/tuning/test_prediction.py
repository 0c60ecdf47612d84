"""Which regression is used, and what it says of itself."""

from __future__ import annotations

import numpy as np
import pytest

from edgelm.tuning.prediction import LEAST, fit


def problem(count: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.random((count, 4))
    return x, 90 + 3 * x[:, 0] - 5 * x[:, 2] + noise * draw.standard_normal(count)


def test_a_line_is_found_by_the_ridge() -> None:
    x, y = problem(30)
    found = fit(x.tolist(), y.tolist(), 0)
    assert found is not None
    assert set(found.errors) == {"ridge", "forest", "nu-svr"}
    assert found.error == min(found.errors.values()) < 0.3
    assert found(x[3].tolist()) == pytest.approx(y[3], abs=0.3)


def test_a_step_is_found_by_the_forest() -> None:
    x, _ = problem(80)
    y = np.where(x[:, 1] > 0.5, 95.0, 60.0)
    found = fit(x.tolist(), y.tolist(), 0)
    assert found is not None
    assert found.kind == "forest"


def test_the_error_is_of_what_was_not_seen() -> None:
    """On noise a regression must not think that it knows anything."""
    draw = np.random.default_rng(1)
    x, y = draw.random((40, 4)), draw.standard_normal(40)
    found = fit(x.tolist(), y.tolist(), 0)
    assert found is not None
    assert found.error > 0.8 * y.std()


def test_the_same_seed_gives_the_same_predictions() -> None:
    x, y = problem(20, noise=0.5)
    one, two = (fit(x.tolist(), y.tolist(), 3) for _ in range(2))
    assert one is not None
    assert two is not None
    assert one.errors == two.errors
    assert one(x[0].tolist()) == two(x[0].tolist())


def test_little_teaches_nothing() -> None:
    x, y = problem(LEAST)
    assert fit(x[:-1].tolist(), y[:-1].tolist(), 0) is None
    assert fit(x.tolist(), [90.0] * LEAST, 0) is None
    assert fit(x.tolist(), y.tolist(), 0) is not None
