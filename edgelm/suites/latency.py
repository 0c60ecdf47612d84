"""The latency suite as tests: is the bundle fast enough, by itself and beside another model."""

from __future__ import annotations

from typing import Any

import pytest

from edgelm.errors import GateError
from edgelm.evaluate.measurement import check_speedup
from edgelm.pytest_plugin import number, setting


def test_95th_percentile(
    pytestconfig: pytest.Config, request: pytest.FixtureRequest
) -> None:
    """One text takes at most ``--edgelm-max-p95-ms`` in 95 of 100 cases."""
    most = number(pytestconfig, "max-p95-ms")
    if most is None:
        pytest.skip("needs --edgelm-max-p95-ms")
    measured: dict[str, Any] = request.getfixturevalue("edgelm_latency")
    found = measured["contenders"][0]["p95_ms"]
    assert found <= most, (
        f"the 95th percentile is {found:.2f} ms; at most {most:g} ms are allowed"
    )


def test_speedup(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> None:
    """One text is answered at least ``--edgelm-min-speedup`` times as fast as by the other model."""
    least = number(pytestconfig, "min-speedup", "x")
    if least is None or setting(pytestconfig, "against") is None:
        pytest.skip("needs --edgelm-min-speedup and --edgelm-against")
    measured: dict[str, Any] = request.getfixturevalue("edgelm_latency")
    for ratio in measured["ratios"]:
        try:
            check_speedup(measured["contenders"][0]["name"], ratio, least)
        except GateError as error:
            pytest.fail(str(error), pytrace=False)
