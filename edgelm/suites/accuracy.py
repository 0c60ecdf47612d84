"""The accuracy suite as tests: is the bundle whole, does it answer, and is it good enough."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgelm.bundle import is_bundle, open_bundle
from edgelm.errors import GateError
from edgelm.evaluate.accuracy import check_drop
from edgelm.golden import load_golden
from edgelm.pytest_plugin import number, setting
from edgelm.runtimes.engine import open_engine
from edgelm.runtimes.verification import verify


def test_golden_examples(pytestconfig: pytest.Config) -> None:
    """The bundle gives on this machine what the original model gave."""
    reference = setting(pytestconfig, "bundle")
    if reference is None or not is_bundle(reference):
        pytest.skip("needs --edgelm-bundle with a bundle")
    opened = open_bundle(reference)
    found = verify(open_engine(opened), load_golden(opened))
    assert found.examples > 0


def test_measures_are_numbers(
    edgelm_quality: dict[str, Any], record_property: Any
) -> None:
    """Every measure of every data set has a value and an interval."""
    for data in edgelm_quality["datasets"]:
        for name, value in data["measures"].items():
            record_property(f"{data['name']}: {name}", value)
            assert math.isfinite(value), f"{name} on {data['name']}"


def test_quality_is_kept(
    edgelm_quality: dict[str, Any], pytestconfig: pytest.Config
) -> None:
    """The measure that counts is not worse than ``--edgelm-max-drop`` allows."""
    allowed = number(pytestconfig, "max-drop", "%")
    if allowed is None or edgelm_quality["against"] is None:
        pytest.skip("needs --edgelm-max-drop and --edgelm-against")
    for data in edgelm_quality["datasets"]:
        first = data["comparisons"][0]
        name = f"{first['measure']} on {data['name']}"
        try:
            check_drop(first["against"], first["value"], allowed, name)
        except GateError as error:
            pytest.fail(f"{error}\n{data['statement']}", pytrace=False)
