"""Precision: a float32 graph to the precision that a bundle states."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
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
    weighted = _weighted_products(before)
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
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        logging.disable(level)
    proto = onnx.load(path)
    done = Counter(node.op_type for node in proto.graph.node)["MatMulInteger"]
    if done != weighted:
        raise ExportError(
            f"Of {weighted} matrix products with constant weights only {done} became int8."
        )
    onnx.checker.check_model(proto)
    return describe(proto, path.name)


def _weighted_products(proto: onnx.ModelProto) -> int:
    """How many matrix products of tokens have constant weights.

    Heads are Gemm, one row a text: they stay in float32, which costs nothing.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    return sum(
        node.op_type == "MatMul" and node.input[1] in constants
        for node in proto.graph.node
    )
