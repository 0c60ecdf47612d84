"""Predicted costs against a sum over products, one by one."""

from __future__ import annotations

import pytest

from edgelm.tuning.costs import CostModel, Layer, key
from edgelm.tuning.space import Configuration

WIDTH, NEURONS, BLOCKS = 32, 64, 2
NS = {"int": 1e-6, "float": 3e-6}  # ms of a weight
MODEL = CostModel(
    layers=(
        Layer("neurons", False, WIDTH, NEURONS, NEURONS, BLOCKS, 1),
        Layer("neurons", True, NEURONS, WIDTH, NEURONS, BLOCKS, 1),
    ),
    rows=8,
    products={
        key(*shape, kind): NS[kind] * WIDTH * left
        for left in (16, 32, 64)
        for shape in ((WIDTH, left), (left, WIDTH))
        for kind in NS
    },
    dense_ms={"int8": 1.0, "fp32": 2.0},
    tail=2.0,
    dense_mb={"int8/8": 0.5, "fp32/8": 1.0},
    groups=(((WIDTH, NEURONS),), ((NEURONS, WIDTH), (WIDTH, NEURONS))),
)


@pytest.mark.parametrize("neurons", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("floats", [0, 1, 2])
def test_products_left_in_float_cost_what_they_take_more(
    neurons: float, floats: int
) -> None:
    found = MODEL.predict(
        Configuration(neurons=neurons, precision="int8", floats=floats)
    )
    left = round(NEURONS * neurons)
    in_float = (0, 1, 3)[floats]  # of four products of the same number of weights
    due_ms = 1.0 - 4 * NS["int"] * WIDTH * NEURONS
    due_ms += (in_float * NS["float"] + (4 - in_float) * NS["int"]) * WIDTH * left
    assert found.latency == pytest.approx(due_ms)
    assert found.p95 == pytest.approx(2 * due_ms)
    removed = 4 * WIDTH * (NEURONS - left)
    due_mb = 0.5 + (3 * in_float * WIDTH * left - removed) / 1e6
    assert found.size_mb == pytest.approx(due_mb)
