"""Targets of the same machine, measured against each other."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import edgelm
from edgelm.bundle import open_bundle
from edgelm.errors import MissingExtraError
from edgelm.export import export_fastest
from edgelm.models import load_model
from edgelm.runtimes import Embedder
from edgelm.targets import RIVALS


def test_the_fastest_is_kept_and_the_rates_are_recorded(
    tiny: Any, tmp_path: Path
) -> None:
    loaded = load_model(str(tiny("embedding")))
    targets = RIVALS["cpu-fastest"]
    bundle, rates = export_fastest(loaded, targets, tmp_path / "b", precision="fp32")
    assert set(rates) == set(targets)
    assert bundle.manifest.target == max(rates, key=rates.__getitem__)
    again = open_bundle(tmp_path / "b")
    assert again.manifest.provenance["texts_per_second"] == rates
    model = edgelm.load(again)
    assert isinstance(model, Embedder)
    assert len(model.encode(["the man"])) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_a_runtime_that_is_not_installed_is_passed_over(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)  # importing it fails
    loaded = load_model(str(tiny("embedding")))
    targets = RIVALS["cpu-fastest"]
    bundle, rates = export_fastest(loaded, targets, tmp_path / "b", precision="fp32")
    assert list(rates) == ["cpu"]
    assert bundle.manifest.target == "cpu"
    with pytest.raises(MissingExtraError, match=r"edgelm\[openvino\]"):
        export_fastest(loaded, targets[::-1], tmp_path / "c", precision="fp32")
    assert [p.name for p in tmp_path.iterdir()] == ["b"]
