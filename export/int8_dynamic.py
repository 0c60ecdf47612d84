"""Dynamic int8: ranges of activations are taken at each call."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from edgelm.bundle import Graph
from edgelm.errors import ExportError, require
from edgelm.export.graph import describe, save, weighted_products


def quantize_dynamic(source: Path, path: Path) -> Graph:
    """Weights per channel, symmetric; activations by what each call brings.

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
    products, heads = weighted_products(before)
    names = [head.name for head in heads]
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
                nodes_to_exclude=[*names, *(f"{name}_MatMul" for name in names)],
                extra_options={"MatMulConstBOnly": True},
            )
    finally:
        logging.disable(level)
    proto = onnx.load(path)
    onnx.checker.check_model(proto)
    graph = describe(proto, path.name)
    done = graph.operators.get("MatMulInteger", 0)
    if done != len(products):
        raise ExportError(
            f"Of {len(products)} matrix products with constant weights {done} became int8."
        )
    return graph
