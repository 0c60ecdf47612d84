"""The search on a problem whose answers are known: what it finds, saves and repeats."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from edgelm.errors import EdgelmError
from edgelm.targets import load_target
from edgelm.tuning.costs import Costs
from edgelm.tuning.pareto import dominates
from edgelm.tuning.running import Job
from edgelm.tuning.search import Found, Limits, losses, search
from edgelm.tuning.space import Configuration, every, presets, space_for

SPACE = space_for(load_target("cpu"), "bert", table_bits=True)
DENSE = 90.0


def quality(c: Configuration) -> float:
    """Smooth, with an elbow; heads cost much, as they do."""
    lost = 0.3 * (1 - c.neurons) + 6 * max(0.0, 0.4 - c.neurons) + 5 * (1 - c.heads)
    lost += 0.4 * (c.precision == "int8") - 0.04 * c.floats + 0.1 * (c.table_bits == 4)
    return DENSE - lost - 0.05 * (c.allocation == "uniform" and c.neurons < 1)


def costs(c: Configuration) -> Costs:
    product = 1.0 if c.precision == "int8" else 2.5
    latency = product * (0.5 + c.neurons + 0.6 * c.heads) + 0.05 * c.floats
    size = (10 * c.neurons + 5 * c.heads) * product + 12 * c.table_bits / 8
    return Costs(latency, 2 * latency, size)


class Bench:
    """Answers evaluations and counts them."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
        self.jobs += jobs
        noise = random.Random(0)
        return [
            {"quality": quality(c) - 0.1 + noise.uniform(-0.05, 0.05)}
            if fidelity == "partial"
            else {"quality": quality(c)}
            for c, fidelity in jobs
        ]

    @property
    def whole(self) -> list[Configuration]:
        return [c for c, fidelity in self.jobs if fidelity == "full"]


def run(limits: Limits | None = None, **options: Any) -> tuple[Found, Bench]:
    bench = Bench()
    options = {"trials": 24, "seed": 0, **options}
    found = search(
        SPACE,
        presets(SPACE),
        costs,
        bench,
        DENSE,
        Limits(1.0) if limits is None else limits,
        **options,
    )
    return found, bench


def test_it_finds_something_better_than_the_presets_and_saves_evaluations() -> None:
    found, bench = run()
    assert len(found.rows) == 24
    assert len(bench.whole) == len(found.whole) < 22
    assert len({row.configuration for row in found.rows}) == 24
    good = [r for r in found.whole if (r.quality or 0) >= DENSE * 0.99]
    first = [r for r in good if r.configuration in presets(SPACE)]
    assert min(losses(r)[1] for r in good) < min(losses(r)[1] for r in first)
    for row in found.front:
        assert not any(dominates(losses(o), losses(row)) for o in found.whole)
    for row in found.rows:
        if row.stopped.startswith("predicted"):
            assert row.quality is None
            assert row.predicted is not None
            assert row.error is not None


def test_the_same_seed_gives_the_same_search_and_another_another() -> None:
    one, two, other = (run(seed=seed, trials=12)[0] for seed in (0, 0, 1))
    assert one.rows == two.rows
    assert one.rows != other.rows


def test_what_cannot_keep_to_the_limits_is_never_evaluated() -> None:
    _, bench = run(Limits(5.0, p95_ms=2.6, size_mb=16.0), trials=12)
    assert bench.whole
    for c, _ in bench.jobs:
        assert costs(c).p95 <= 2.6 * 1.25
        assert costs(c).size_mb <= 16 * 1.05


def test_a_small_space_is_exhausted() -> None:
    space = {"neurons": (0.5, 0.75, 1.0), "precision": ("int8", "fp32")}
    bench = Bench()
    found = search(space, [], costs, bench, DENSE, Limits(50.0), trials=100)
    assert {row.configuration for row in found.rows} == set(every(space))


def test_a_failed_evaluation_is_recorded_and_the_search_goes_on() -> None:
    bench = Bench()

    def evaluate(jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
        return [
            {"error": "It was killed."} if c.neurons == 0.5 else answer
            for (c, _), answer in zip(jobs, bench(jobs), strict=True)
        ]

    found = search(
        SPACE, presets(SPACE), costs, evaluate, DENSE, Limits(1.0), trials=12
    )
    failed = [row for row in found.rows if row.configuration.neurons == 0.5]
    assert failed
    assert {row.stopped for row in failed} == {"failed: It was killed."}
    assert len(found.rows) == 12
    assert found.whole


def test_nothing_that_can_be_evaluated_is_an_error_at_once() -> None:
    with pytest.raises(EdgelmError, match=r"the first one said: failed: No\."):
        search(
            SPACE,
            presets(SPACE),
            costs,
            lambda jobs: [{"error": "No."} for _ in jobs],
            DENSE,
            Limits(1.0),
            trials=16,
        )
