"""OpenVINO behind the same contract as ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import edgelm
from edgelm.bundle import open_bundle
from edgelm.errors import InputError, SessionError
from edgelm.golden import load_golden
from edgelm.metrics import snr_db
from edgelm.runtimes import Embedder
from edgelm.runtimes.engine import open_engine
from edgelm.runtimes.openvino import OpenVinoSession
from edgelm.runtimes.verification import verify

Bundles = Callable[..., Path]
TEXTS = ["the man plays", "", "a river in paris " * 9, "book " * 100, "flute"] * 40


def encode(path: Path, **options: object) -> np.ndarray:
    model = edgelm.load(path, **options)  # type: ignore[arg-type]
    assert isinstance(model, Embedder)
    return model.encode(TEXTS)


@pytest.fixture(scope="session")
def fp32(bundles: Bundles) -> Path:
    return bundles("embedding", "fp32", "cpu-openvino")


def test_it_computes_what_onnx_runtime_does(fp32: Path) -> None:
    due = encode(fp32, provider="CPUExecutionProvider")
    found = encode(fp32)
    assert snr_db(due, found) > 100
    assert "OpenVINO" in edgelm.load(fp32).engine.session.runtime


@pytest.mark.parametrize("provider", ["OpenVINO", "CPUExecutionProvider"])
def test_workers_give_the_same_in_the_same_order(fp32: Path, provider: str) -> None:
    due = encode(fp32, threads=1, provider=provider)
    found = encode(fp32, threads=1, workers=3, provider=provider)
    np.testing.assert_allclose(found, due, atol=1e-6)


def test_int8_is_verified_where_it_runs(bundles: Bundles) -> None:
    bundle = open_bundle(bundles("embedding", "int8", "cpu-openvino"))
    assert bundle.manifest.graph.operators["QuantizeLinear"] == 8
    result = verify(open_engine(bundle), load_golden(bundle))
    assert result.snr_db > 20


def test_the_length_of_one_text_is_rounded_up_and_no_further(fp32: Path) -> None:
    """32 is the longest that the model takes; 31 and 32 must not become 48."""
    model = edgelm.load(fp32)
    assert isinstance(model, Embedder)
    together = model.encode(["book " * n for n in (1, 29, 30, 40)])
    for n, row in zip((1, 29, 30, 40), together, strict=True):
        np.testing.assert_allclose(model.encode(["book " * n])[0], row, atol=1e-5)


def test_a_graph_that_does_not_load(tmp_path: Path) -> None:
    (tmp_path / "g.onnx").write_bytes(b"no graph")
    with pytest.raises(SessionError, match=r"OpenVINO .* cannot load"):
        OpenVinoSession(tmp_path / "g.onnx", threads=1)


def test_without_openvino_the_extra_is_named(fp32: Path) -> None:
    script = (
        "import sys; sys.modules['openvino'] = None\n"
        "import edgelm\n"
        f"edgelm.load({str(fp32)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "pip install 'edgelm[openvino]'" in done.stderr


@pytest.mark.parametrize("options", [{"workers": 0}, {"threads": 0}])
def test_no_workers_or_threads(fp32: Path, options: dict[str, int]) -> None:
    with pytest.raises(InputError, match="at least 1"):
        edgelm.load(fp32, **options)  # type: ignore[arg-type]
