"""Weights of 4 and 8 bits: packing, error, and what ONNX Runtime makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.bundle import open_bundle
from edgelm.errors import ConfigError, ExportError, TargetError
from edgelm.export import export
from edgelm.export.audit import audit
from edgelm.export.editor import LARGE_ROWS, TABLE_BLOCK
from edgelm.export.int8_dynamic import quantize_dynamic
from edgelm.export.rounding import pack, quantise_blocks
from edgelm.export.weight_only import WeightOnly, quantize_weights
from edgelm.models import load_model
from tests.conftest import export_bundle


def unpacked(
    packed: np.ndarray, steps: np.ndarray, bits: int, block: int, inputs: int
) -> np.ndarray:
    """The definition, a weight at a time."""
    outputs = len(packed)
    weights = np.zeros((inputs, outputs), np.float32)
    for column in range(outputs):
        for row in range(inputs):
            which, place = divmod(row, block)
            if bits == 8:
                level = int(packed[column, which, place])
            else:
                byte = int(packed[column, which, place // 2])
                level = byte >> 4 if place % 2 else byte & 15
            weights[row, column] = (level - 2 ** (bits - 1)) * steps[column, which]
    return weights


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 4),
    bits=st.sampled_from([4, 8]),
    block=st.sampled_from([32, 64]),
    zero=st.booleans(),
    exponent=st.integers(-20, 10),
    seed=st.integers(0, 99),
)
def test_no_weight_is_farther_off_than_plain_rounding_allows(
    inputs: int,
    outputs: int,
    bits: int,
    block: int,
    zero: bool,
    exponent: int,
    seed: int,
) -> None:
    draw = np.random.default_rng(seed)
    weights = draw.standard_normal((inputs, outputs)).astype(np.float32)
    weights *= 2.0**exponent
    weights[:, 0] *= not zero
    levels, steps = quantise_blocks(weights, bits, block)
    assert levels.max() < 2**bits
    assert np.isfinite(steps).all()
    assert (steps != 0).all()
    found = unpacked(pack(levels, bits), steps, bits, block, inputs)
    limit = 2 ** (bits - 1) - 1
    for first in range(0, inputs, block):
        part = weights[first : first + block]
        step = np.abs(part).max(0) / limit + 1e-30
        plain = np.rint(part / step) * step
        allowed = np.square(plain - part).sum(0)
        error = np.square(found[first : first + block] - part).sum(0)
        assert (error <= allowed * 1.001 + 1e-12 * np.square(part).sum(0)).all()
    if zero:
        assert not found[:, 0].any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("inputs", [32, 96, 100])
def test_onnx_runtime_reads_the_packing_as_defined(
    tmp_path: Path, bits: int, block: int, inputs: int
) -> None:
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((inputs, 7)).astype(np.float32)
    x = draw.standard_normal((2, 5, inputs)).astype(np.float32)
    helper = onnx.helper
    proto = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
                helper.make_node("Relu", ["h"], ["y"], name="last"),
            ],
            "g",
            [helper.make_tensor_value_info("x", 1, ["batch", "sequence", inputs])],
            [helper.make_tensor_value_info("y", 1, ["batch", "sequence", 7])],
            [onnx.numpy_helper.from_array(weights, "w")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )
    onnx.save(proto, tmp_path / "f.onnx")
    quantize_weights(tmp_path / "f.onnx", tmp_path / "q.onnx", WeightOnly(bits, block))
    levels, steps = quantise_blocks(weights, bits, block)
    due = x @ unpacked(pack(levels, bits), steps, bits, block, inputs)
    session = onnxruntime.InferenceSession(
        tmp_path / "q.onnx", providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"x": x})
    # The kernel may round activations to int8 by block.
    size = np.abs(due).max()
    np.testing.assert_allclose(found, np.maximum(due, 0), atol=0.02 * size)
    assert np.abs(x @ weights - due).max() > 0.02 * size or bits == 8


@pytest.mark.parametrize(("bits", "least"), [(8, 30), (4, 10)])
def test_a_bundle_of_weights(tiny: Any, tmp_path: Path, bits: int, least: int) -> None:
    path = export_bundle(
        str(tiny("embedding")), tmp_path / "b", precision=f"int{bits}-weights"
    )
    manifest = open_bundle(path).manifest
    assert manifest.precision == f"int{bits}-weights"
    assert manifest.graph.operators["MatMulNBits"] == 12
    assert manifest.golden.measured_snr_db > least
    assert manifest.provenance["precision"]["block"] == 32
    assert 0 < manifest.provenance["precision"]["drop"] < 0.1
    found = audit(onnx.load(path / "model.onnx"))
    assert {w.precision for w in found if w.kind == "product"} == {f"int{bits}-weights"}
    assert sum(w.precision == "int8" for w in found if w.kind == "table") == 2


def test_the_size_is_that_of_the_bits(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((1024, 256)).astype(np.float32)
    for bits, block in ((4, 32), (4, 128), (8, 64)):
        levels, steps = quantise_blocks(weights, bits, block)
        stored = pack(levels, bits).nbytes + steps.nbytes
        assert stored == weights.size * (bits / 8 + 4 / block)


@pytest.mark.parametrize("target", ["jetson-orin-nano", "cpu-openvino"])
def test_targets_without_the_operator_refuse_it(
    tiny: Any, tmp_path: Path, target: str
) -> None:
    with pytest.raises(
        TargetError, match=rf"{target} has the precisions .*needs MatMulNBits"
    ):
        export(
            load_model(str(tiny("embedding"))),
            target,
            tmp_path / "b",
            precision="int4-weights",
        )


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="32, 64 or 128"):
        WeightOnly(4, 48)
    with pytest.raises(ConfigError, match="4 or 8 bits"):
        WeightOnly(3)


def table_of(path: Path, table: np.ndarray) -> Path:
    """Rows of a table, and a weighted product behind them."""
    helper, make = onnx.helper, onnx.helper.make_tensor_value_info
    width = table.shape[1]
    nodes = [
        helper.make_node("Gather", ["t", "input_ids"], ["e"], name="rows"),
        helper.make_node("MatMul", ["e", "w"], ["h"], name="product"),
        helper.make_node("Relu", ["h"], ["y"], name="last"),
    ]
    constants = {"t": table, "w": np.eye(width, 3)}
    graph = helper.make_graph(
        nodes,
        "g",
        [make("input_ids", 7, ["batch", "sequence"])],
        [
            make("e", 1, ["batch", "sequence", width]),
            make("y", 1, ["batch", "sequence", 3]),
        ],
        [onnx.numpy_helper.from_array(v.astype("f4"), n) for n, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize("way", ["int8", "4 bits"])
def test_a_large_table_of_4_bits(tmp_path: Path, way: str) -> None:
    """ONNX Runtime gives the rows that the levels and steps define; zeros stay zero."""
    table = np.random.default_rng(0).standard_normal((LARGE_ROWS, 128))
    table[7] = 0
    table[:, 64:] *= 2.0**-9
    source = table_of(tmp_path / "f.onnx", table)
    if way == "int8":
        quantize_dynamic(source, tmp_path / "q.onnx", table_bits=4)
    else:
        quantize_weights(source, tmp_path / "q.onnx", WeightOnly(4), table_bits=4)
    levels, steps = quantise_blocks(
        table.T.astype("f4"), 4, TABLE_BLOCK, stored=np.float16
    )
    assert (steps == steps.astype(np.float16)).all()
    due = unpacked(pack(levels, 4), steps, 4, TABLE_BLOCK, 128).T
    session = onnxruntime.InferenceSession(
        tmp_path / "q.onnx", providers=["CPUExecutionProvider"]
    )
    ids = np.array([[0, 7, LARGE_ROWS - 1]])
    (found,) = session.run(["e"], {"input_ids": ids})
    # The operator rounds what it gives to float16.
    np.testing.assert_allclose(found[0], due[ids[0]], rtol=2**-10)
    assert not found[0, 1].any()
    near = np.square(due - table).sum(1) / np.maximum(np.square(table).sum(1), 1e-9)
    assert near.max() < 0.03
    (entry,) = [w for w in audit(onnx.load(tmp_path / "q.onnx")) if w.kind == "table"]
    assert (entry.precision, entry.weights) == ("int4", table.size)
    assert (tmp_path / "q.onnx").stat().st_size < table.size * 0.6


def test_a_small_table_keeps_8_bits_and_an_odd_one_is_refused(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    small = table_of(tmp_path / "f.onnx", draw.standard_normal((100, 64)))
    quantize_dynamic(small, tmp_path / "q.onnx", table_bits=4)
    found = audit(onnx.load(tmp_path / "q.onnx"))
    assert {w.precision for w in found if w.kind == "table"} == {"int8"}
    odd = table_of(tmp_path / "f.onnx", draw.standard_normal((LARGE_ROWS, 96)))
    with pytest.raises(ExportError, match="96 wide; 4 bits take a multiple of 64"):
        quantize_dynamic(odd, tmp_path / "q.onnx", table_bits=4)


@pytest.mark.parametrize(
    ("target", "precision", "error", "why"),
    [
        ("cpu-openvino", "int8", TargetError, "GatherBlockQuantized.*openvino"),
        ("jetson-orin-nano", "int8", TargetError, "GatherBlockQuantized.*tensorrt"),
        ("cpu", "fp32", ConfigError, "goes with int8, .* not with fp32"),
    ],
)
def test_4_bits_of_a_table_are_refused_where_they_cannot_be(
    tiny: Any, tmp_path: Path, target: str, precision: str, error: type, why: str
) -> None:
    with pytest.raises(error, match=why):
        export(
            load_model(str(tiny("embedding"))),
            target,
            tmp_path / "b",
            precision=precision,
            table_bits=4,
        )
    assert not (tmp_path / "b").exists()
