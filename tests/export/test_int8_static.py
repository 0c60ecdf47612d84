"""Static int8: what is chosen, what stands in the graph, and that runtimes agree on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.errors import ExportError
from edgelm.export.graph import export_graph, random_inputs
from edgelm.export.int8_static import (
    Feeds,
    choose_scaling,
    observe,
    quantize_static,
)
from edgelm.export.rounding import quantise_weights
from edgelm.manifest import Graph
from edgelm.metrics import snr_db
from edgelm.models import load_model
from edgelm.runtimes.openvino import OpenVinoSession

NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def feeds(count: int = 40) -> Iterator[Feeds]:
    for length in range(5, 5 + count):
        yield random_inputs(NAMES, 1, 5 + length % 20, 60)


@pytest.fixture
def graph(tiny: Any, tmp_path: Path) -> Path:
    """A float32 graph one of whose inputs has an outlier channel, as those of real models have."""
    loaded = load_model(str(tiny("embedding")))
    with torch.no_grad():
        for layer in loaded.model.encoder.layer:
            layer.attention.self.value.bias[3] += 40
            layer.attention.output.dense.weight[:, 3] /= 40
    export_graph(loaded, tmp_path / "f.onnx", 20)
    return tmp_path / "f.onnx"


def quantize(source: Path, path: Path, given: Iterable[Feeds]) -> Graph:
    return quantize_static(source, path, observe(source, given))


def outputs(path: Path, given: Feeds) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        path.read_bytes(), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, dict(given))
    return np.asarray(output)


@settings(max_examples=50, deadline=None)
@given(
    inputs=st.integers(1, 9),
    columns=st.integers(1, 5),
    zero=st.booleans(),
    exponent=st.integers(-20, 10),
    seed=st.integers(0, 99),
)
def test_weights_are_symmetric_and_close(
    inputs: int, columns: int, zero: bool, exponent: int, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    weights = draw.standard_normal((inputs, columns)).astype(np.float32)
    weights *= 2.0**exponent
    weights[:, 0] *= not zero
    levels, steps = quantise_weights(weights)
    assert levels.dtype == np.int8
    assert levels.min() >= -127
    assert (steps > 0).all()
    assert np.isfinite(steps).all()
    rounded = (
        np.clip(np.rint(weights / (np.abs(weights).max(0) / 127 + 1e-30)), -127, 127)
        * np.abs(weights).max(0)
        / 127
    )
    plain = np.square(rounded - weights).sum(0)  # no clipping: the usual way
    found = np.square(levels * steps - weights).sum(0)
    assert (found <= plain * 1.001 + 1e-12 * np.square(weights).sum(0)).all()


def test_outlier_channels_move_into_the_weights() -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((400, 16)).astype(np.float32)
    x[:, 2] *= 100
    weights = draw.standard_normal((16, 8)).astype(np.float32)
    weights[2] /= 100
    scaling = choose_scaling(x, weights)
    assert scaling.migration is not None
    assert scaling.channel[2] > 10 * np.median(scaling.channel)
    step = np.abs(x).max() / 127
    plain = (np.rint(x / step) * step - x) @ weights
    assert scaling.error < 0.1 * np.square(plain).sum() / np.square(x @ weights).sum()


def test_nothing_moves_where_nothing_sticks_out() -> None:
    """Moving never does worse than not moving: that is one of the choices."""
    x = np.random.default_rng(0).standard_normal((400, 16)).astype(np.float32)
    scaling = choose_scaling(x, np.eye(16, dtype=np.float32))
    step = np.abs(x).max() / 127
    plain = np.rint(x / step) * step - x
    assert (
        scaling.error <= 1.05 * np.square(plain).sum() / np.square(x - x.mean(0)).sum()
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_few_rows_and_dead_channels(rows: int) -> None:
    x = np.zeros((rows, 4), np.float32)
    x[:, 0] = 1.0
    scaling = choose_scaling(x, np.ones((4, 2), np.float32))
    assert np.isfinite(scaling.channel).all()
    assert np.isfinite(scaling.scale)
    assert scaling.scale > 0


def test_all_weighted_products_are_int8_and_the_answer_stays(
    graph: Path, tmp_path: Path
) -> None:
    described = quantize(graph, tmp_path / "q.onnx", feeds())
    assert described.operators["QuantizeLinear"] == 8  # query, key and value share one
    proto = onnx.load(tmp_path / "q.onnx")
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    made_by = {o: n for n in proto.graph.node for o in n.output}
    int8 = 0
    for node in proto.graph.node:
        source = made_by.get(node.input[1]) if node.op_type == "MatMul" else None
        if source is not None and source.op_type == "DequantizeLinear":
            int8 += 1
            assert constants[source.input[0]].dtype == np.int8
            assert not constants[source.input[2]].any()
    assert int8 == 12  # six linear layers, twice
    given = random_inputs(NAMES, 4, 12, 60)
    assert snr_db(outputs(graph, given), outputs(tmp_path / "q.onnx", given)) > 25


def test_without_moving_the_outlier_costs_quality(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture is what it says: the test above would fail for a plain quantiser."""
    quantize(graph, tmp_path / "q.onnx", feeds())
    monkeypatch.setattr("edgelm.export.int8_static.MIGRATIONS", (None,))
    quantize(graph, tmp_path / "p.onnx", feeds())
    given = random_inputs(NAMES, 4, 12, 60)
    due = outputs(graph, given)
    moved = snr_db(due, outputs(tmp_path / "q.onnx", given))
    assert moved > 2 + snr_db(due, outputs(tmp_path / "p.onnx", given))


def test_runtimes_agree_on_the_graph(graph: Path, tmp_path: Path) -> None:
    quantize(graph, tmp_path / "q.onnx", feeds())
    session = OpenVinoSession(tmp_path / "q.onnx", threads=1, exact=True)
    for batch, length in ((1, 3), (4, 12)):
        given = random_inputs(NAMES, batch, length, 60)
        (found,) = session.run(given).values()
        # A value between two levels may go either way.
        assert snr_db(outputs(tmp_path / "q.onnx", given), found) > 30


def test_large_tables_are_int8_by_row(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((1500, 8)).astype(np.float32)
    table[7] *= 1000  # one row alone must not coarsen the others
    helper = onnx.helper
    proto = helper.make_model(
        helper.make_graph(
            [helper.make_node("Gather", ["table", "input_ids"], ["y"])],
            "g",
            [helper.make_tensor_value_info("input_ids", 7, ["batch", "sequence"])],
            [helper.make_tensor_value_info("y", 1, ["batch", "sequence", 8])],
            [onnx.numpy_helper.from_array(table, "table")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.save(proto, tmp_path / "f.onnx")
    ids = {"input_ids": np.arange(20)[None]}
    quantize(tmp_path / "f.onnx", tmp_path / "q.onnx", [ids])
    found = outputs(tmp_path / "q.onnx", ids)[0]
    error = np.abs(found - table[:20]).max(1) / np.abs(table[:20]).max(1)
    assert error.max() < 1 / 127
    assert (tmp_path / "q.onnx").stat().st_size < table.nbytes / 2


def test_values_that_are_not_finite_are_refused(graph: Path, tmp_path: Path) -> None:
    proto = onnx.load(graph)
    for tensor in proto.graph.initializer:
        if tensor.name.endswith("LayerNorm.weight"):
            value = onnx.numpy_helper.to_array(tensor) * np.float32(np.inf)
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(proto, graph)
    with pytest.raises(ExportError, match="not finite"):
        quantize(graph, tmp_path / "q.onnx", feeds(3))
