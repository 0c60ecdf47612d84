"""How fast this machine multiplies matrices of given shapes, with nothing else to do."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.bundle import Bundle
from edgelm.errors import require
from edgelm.evaluate.operators import Product
from edgelm.evaluate.recording import open_recorder
from edgelm.export.graph import IR_VERSION
from edgelm.runtimes.engine import chosen_provider
from edgelm.runtimes.openvino import PROVIDER

if TYPE_CHECKING:
    import onnx

# Of these calls the fastest is what the machine can do.
_CALLS = 20
# The runtimes' clocks count microseconds; what takes less shows as nothing.
_STEP_MS = 1e-3
_NAME = "gemm"


def gemm_ceilings(
    bundle: Bundle, shapes: Collection[tuple[int, int]], rows: int, threads: int | None
) -> dict[Product, float]:
    """Measure matrix products alone, in a bundle's runtime and by its own clock.

    Args:
        bundle: Whose runtime and settings are measured.
        shapes: Inputs and outputs of a row.
        rows: Rows of a product.
        threads: As for `edgelm.load`.

    Returns:
        10^9 operations a second (a multiplication and an addition are two) of each shape,
        in integers and in float: float32, or bfloat16 where the runtime computes in it
        what is not int8 of such a bundle.
    """
    products = [Product(*shape, whole) for shape in shapes for whole in (False, True)]
    return {
        product: 2
        * rows
        * product.inputs
        * product.outputs
        / max(_fastest_ms(bundle, product, rows, threads), _STEP_MS)
        / 1e6
        for product in products
    }


def _fastest_ms(
    bundle: Bundle, product: Product, rows: int, threads: int | None
) -> float:
    onnx = require("onnx", "export")
    draw = np.random.default_rng(0)
    proto = _graph(product, chosen_provider(bundle, None) == PROVIDER)
    kind = proto.graph.input[0].type.tensor_type.elem_type
    x: Any = draw.integers(0, 255, (1, rows, product.inputs))
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / f"{_NAME}.onnx"
        onnx.save(proto, path)
        session = open_recorder(bundle, path, Path(work), threads)
        for _ in range(_CALLS):
            session.run({"x": x.astype(onnx.helper.tensor_dtype_to_np_dtype(kind))})
        recording = session.finish()
    return min(
        sum(ms for name, ms in call.items() if _NAME in recording.origins[name])
        for call in recording.calls
    )


def _graph(product: Product, quantisers: bool) -> onnx.ModelProto:
    """One product: of float, of integers, or of float between quantisers."""
    onnx = require("onnx", "export")
    helper, constant = onnx.helper, onnx.numpy_helper.from_array
    draw = np.random.default_rng(0)
    weights: Any = draw.standard_normal((product.inputs, product.outputs))
    whole = np.clip(np.rint(weights * 40), -127, 127).astype(np.int8)
    float32, uint8, int32 = 1, 2, 6
    if not product.whole:
        kinds = float32, float32
        nodes = [helper.make_node("MatMul", ["x", "w"], [_NAME], name=_NAME)]
        constants = [constant(weights.astype(np.float32), "w")]
    elif not quantisers:
        kinds = uint8, int32
        inputs = ["x", "w", "x.zero", "w.zero"]
        nodes = [helper.make_node("MatMulInteger", inputs, [_NAME], name=_NAME)]
        constants = [
            constant(whole, "w"),
            constant(np.array(128, np.uint8), "x.zero"),
            constant(np.zeros(product.outputs, np.int8), "w.zero"),
        ]
    else:
        kinds = float32, float32
        pieces = [
            ("QuantizeLinear", ["x", "step", "zero"], "x.int8", "x.int8"),
            ("DequantizeLinear", ["x.int8", "step", "zero"], "x.near", "x.near"),
            ("DequantizeLinear", ["w", "step", "zero"], "w.near", "w.near"),
            ("MatMul", ["x.near", "w.near"], _NAME, _NAME),
        ]
        nodes = [helper.make_node(k, i, [o], name=n) for k, i, o, n in pieces]
        constants = [
            constant(whole, "w"),
            constant(np.array(0.5, np.float32), "step"),
            constant(np.array(0, np.int8), "zero"),
        ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kinds[0], ["batch", "sequence", product.inputs])],
        [value(_NAME, kinds[1], ["batch", "sequence", product.outputs])],
        constants,
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=IR_VERSION
    )
