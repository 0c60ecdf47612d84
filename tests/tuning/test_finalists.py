"""Which finalist wins."""

from __future__ import annotations

from typing import Any

import pytest

from edgelm.tuning.finalists import choose
from edgelm.tuning.search import Limits


def finalist(
    name: str, speed: float, quality: float, confirmed_drop: float, size_mb: float = 20
) -> dict[str, Any]:
    return {
        "name": name,
        "latency_ratio": speed,
        "predicted": 1.0,
        "p95_ms": 5 * speed,
        "quality": quality,
        "confirmed_drop": confirmed_drop,
        "size_mb": size_mb,
    }


FAST_BY_LUCK = finalist("fast by luck", 0.8, 89.5, 1.2)
FAST = finalist("fast", 0.9, 89.4, 0.9)
ALIKE = finalist("alike", 0.92, 89.8, 0.3)
SLOW = finalist("slow", 1.0, 90.0, 0.1, size_mb=15)
ALL = [FAST_BY_LUCK, FAST, ALIKE, SLOW]


@pytest.mark.parametrize(
    ("finalists", "limits", "due"),
    [
        (ALL, Limits(1.0), "alike"),
        ([FAST_BY_LUCK, FAST, SLOW], Limits(1.0), "fast"),
        (ALL, Limits(1.5), "fast by luck"),
        (ALL, Limits(1.0, size_mb=15), "slow"),
        (ALL, Limits(1.0, p95_ms=4.0), "fast by luck"),
        ([FAST_BY_LUCK], Limits(1.0), "fast by luck"),
        ([], Limits(1.0), None),
        (ALL, Limits(1.0, p95_ms=1.0), None),
    ],
)
def test_the_fastest_wins_that_both_halves_of_the_rows_allow(
    finalists: list[dict[str, Any]], limits: Limits, due: str | None
) -> None:
    best = choose(finalists, limits)
    assert (best and best["name"]) == due
