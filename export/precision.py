"""Precision: a float32 graph to the precision that a bundle states."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from edgelm.bundle import Graph
from edgelm.errors import ExportError, require
from edgelm.export.graph import describe, save

if TYPE_CHECKING:
    import onnx


def quantize_int8(source: Path, path: Path) -> Graph:
    """Dynamic int8: weights per channel, symmetric; activations by what each call brings.

    Args:
        source: A float32 graph.
        path: The file to write.

    Returns:
        The new graph's interface.

    Raises:
        ExportError: A matrix product with constant weights stayed in float32.
    """
    onnx = require("onnx", "export")
    quantization = require("onnxruntime.quantization", "export")
    before = onnx.load(source)
    weighted, heads = _weighted_products(before)
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            shaped = Path(work) / "shaped.onnx"
            save(onnx.shape_inference.infer_shapes(before), shaped)
            quantization.quantize_dynamic(
                shaped,
                path,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul", "Gather"],
                # The quantiser makes a MatMul of each Gemm, under this name.
                nodes_to_exclude=[*heads, *(f"{name}_MatMul" for name in heads)],
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        logging.disable(level)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    graph = describe(proto, path.name)
    done = graph.operators.get("MatMulInteger", 0)
    if done != weighted:
        raise ExportError(
            f"Of {weighted} matrix products with constant weights {done} became int8."
        )
    return graph


def _weighted_products(proto: onnx.ModelProto) -> tuple[int, list[str]]:
    """How many matrix products shall become int8, and the names of those of heads.

    A head is a Gemm (one row a text), or what gives the graph's output but for a
    bias. Heads are small, and every error in them is an error of the answer.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    products = [
        node
        for node in proto.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants
    ]
    last = {output.name for output in proto.graph.output}
    for node in reversed(proto.graph.node):
        if node.op_type == "Add" and node.output[0] in last:
            last.update(node.input)
    heads = [n.name for n in products if n.op_type == "Gemm" or n.output[0] in last]
    return len(products) - len(heads), heads
