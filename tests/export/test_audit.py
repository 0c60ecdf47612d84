"""A graph is what it says; what is awkward in weights and activations is met."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgelm.errors import ExportError
from edgelm.export import int8_dynamic, weight_only
from edgelm.export.audit import audit, write
from edgelm.export.graph import random_inputs
from edgelm.export.half import write_half
from edgelm.export.int8_dynamic import quantize_dynamic
from edgelm.export.int8_static import observe, quantize_static
from edgelm.export.weight_only import WeightOnly, quantize_weights
from edgelm.runtimes.session import OnnxSession

Quantise = Callable[[Path, Path, list[dict[str, Any]]], Any]

WAYS: dict[str, Quantise] = {
    "dynamic": lambda f, q, feeds: quantize_dynamic(f, q),
    "static": lambda f, q, feeds: quantize_static(f, q, observe(f, feeds)),
    "8 bits": lambda f, q, feeds: quantize_weights(f, q, WeightOnly(8)),
    "4 bits": lambda f, q, feeds: quantize_weights(f, q, WeightOnly(4)),
    "half": write_half,
}


def layer_of(path: Path, weights: np.ndarray, table: np.ndarray | None = None) -> Path:
    """``y = relu(x @ weights)``, and rows of a table beside it."""
    helper, make = onnx.helper, onnx.helper.make_tensor_value_info
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["y"], name="last"),
    ]
    inputs = [make("x", 1, ["batch", "sequence", weights.shape[0]])]
    outputs = [make("y", 1, ["batch", "sequence", weights.shape[1]])]
    constants = [onnx.numpy_helper.from_array(weights.astype("f4"), "w")]
    inputs.append(make("input_ids", 7, ["batch", "sequence"]))
    table = np.eye(40, 8) if table is None else table
    nodes.append(helper.make_node("Gather", ["t", "input_ids"], ["e"], name="rows"))
    outputs.append(make("e", 1, ["batch", "sequence", table.shape[1]]))
    constants.append(onnx.numpy_helper.from_array(table.astype("f4"), "t"))
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def answers(path: Path, x: np.ndarray) -> np.ndarray:
    # As a bundle runs: on a CPU without VNNI a bare session's int8 products saturate.
    session = OnnxSession(path, "CPUExecutionProvider")
    feeds = {"x": x.astype("f4"), "input_ids": np.zeros(x.shape[:2], np.int64)}
    return np.asarray(session.run(feeds)["y"])


def feeds_of(x: np.ndarray) -> list[dict[str, Any]]:
    ids = np.zeros(x.shape[:2], np.int64)
    return [{"x": x.astype("f4"), "input_ids": ids}] * 3


@pytest.mark.parametrize("way", WAYS)
def test_channels_of_zeros_stay_zero(tmp_path: Path, way: str) -> None:
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((64, 6))
    weights[:, 2] = 0
    weights[5] = 0
    x = draw.standard_normal((1, 40, 64))
    x[..., 7] = 0
    table = draw.standard_normal((50, 8))
    table[3] = 0
    layer_of(tmp_path / "f.onnx", weights, table)
    WAYS[way](tmp_path / "f.onnx", tmp_path / "q.onnx", feeds_of(x))
    due = answers(tmp_path / "f.onnx", x)
    found = answers(tmp_path / "q.onnx", x)
    # The kernel of 4 and 8 bits adds and takes away the middle of its levels, in float32.
    nearly = 1e-5 if "bits" in way else 0.0
    assert np.abs(found[..., 2]).max() <= nearly
    np.testing.assert_allclose(found, due, atol=0.2 * np.abs(due).max())
    nothing = answers(tmp_path / "q.onnx", 0 * x)
    assert not nothing.any(), "an input of zeros alone gives zeros"


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, way: str) -> None:
    weights = np.ones((64, 6))
    weights[3, 4], weights[1, 1] = np.nan, np.inf
    layer_of(tmp_path / "f.onnx", weights)
    with pytest.raises(
        ExportError, match=r"2 of 384 weights of product are not finite.*damaged"
    ):
        WAYS[way](
            tmp_path / "f.onnx", tmp_path / "q.onnx", feeds_of(np.ones((1, 9, 64)))
        )
    assert not (tmp_path / "q.onnx").exists()


@pytest.mark.parametrize("way", ["static", "dynamic"])
def test_values_beyond_the_range_saturate_and_do_not_wrap(
    tmp_path: Path, way: str
) -> None:
    """At ten times what calibration saw, and at sums as large as int8 products can be."""
    draw = np.random.default_rng(0)
    layer_of(tmp_path / "f.onnx", np.ones((1024, 3)))
    x = draw.uniform(0.5, 1, (1, 40, 1024))
    WAYS[way](tmp_path / "f.onnx", tmp_path / "q.onnx", feeds_of(x))
    usual, beyond = (answers(tmp_path / "q.onnx", scale * x) for scale in (1, 10))
    np.testing.assert_allclose(usual, answers(tmp_path / "f.onnx", x), rtol=0.05)
    assert np.isfinite(beyond).all()
    assert (beyond >= 0.99 * usual).all(), "a value that wrapped would be negative"
    if way == "dynamic":  # the range is the call's own
        np.testing.assert_allclose(beyond, 10 * usual, rtol=0.01)


def test_a_product_that_stayed_in_float_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer_of(tmp_path / "f.onnx", np.ones((64, 6)))
    for module, quantise in (
        (int8_dynamic, lambda: quantize_dynamic(tmp_path / "f.onnx", tmp_path / "q")),
        (
            weight_only,
            lambda: quantize_weights(
                tmp_path / "f.onnx", tmp_path / "q", WeightOnly(8)
            ),
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, "weighted_products", lambda proto: ([], []))
            with pytest.raises(
                ExportError,
                match=r"product is fp32 instead of int8.*found: 1 fp32, 1 int8",
            ):
                quantise()


@pytest.mark.parametrize("scale", [0.0, np.nan, np.inf, -1.0])
def test_a_scale_that_is_none_is_an_error(tmp_path: Path, scale: float) -> None:
    layer_of(tmp_path / "f.onnx", np.ones((64, 6)))
    x = np.ones((1, 9, 64))
    WAYS["static"](tmp_path / "f.onnx", tmp_path / "q.onnx", feeds_of(x))
    proto = onnx.load(tmp_path / "q.onnx")
    for tensor in proto.graph.initializer:
        if tensor.name == "product.weight.step":
            steps = np.array([1, scale, 1, 1, 1, 1], np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(steps, tensor.name))
    with pytest.raises(ExportError, match=r"scales of .* not all positive and finite"):
        write(proto, tmp_path / "r.onnx", {"product": "int8"})


def test_int8_weights_without_int8_inputs_are_not_int8(
    bundles: Callable[..., Path], tmp_path: Path
) -> None:
    source = bundles("embedding") / "model.onnx"
    names = ["input_ids", "attention_mask", "token_type_ids"]
    feeds = [random_inputs(names, 1, 4 + i, 60) for i in range(9)]
    quantize_static(source, tmp_path / "q.onnx", observe(source, feeds))
    proto = onnx.load(tmp_path / "q.onnx")
    first = next(n for n in proto.graph.node if n.name == "node_MatMul_23")
    wanted = {w.node: w.precision for w in audit(proto)}
    first.input[0] = first.input[0].removesuffix(".quantised")
    with pytest.raises(ExportError, match="MatMul_23 is int8-weights instead of int8"):
        write(proto, tmp_path / "r.onnx", wanted)
