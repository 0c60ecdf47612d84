"""Integer arithmetic in the operators that every runtime has for integers.

TensorRT's parser takes CumSum and Clip of floating-point numbers only (docs/operators.md of onnx-tensorrt); torch
writes positions with both, in int64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelm.errors import require

if TYPE_CHECKING:
    import onnx


def plain_integers(proto: onnx.ModelProto) -> None:
    """Replace CumSum and Clip of integers, in place.

    A sum goes through float32, which is exact for sums below 2^24: they are of masks, at most as long as the
    input. A clip becomes a maximum and a minimum.
    """
    onnx = require("onnx", "export")
    shaped = onnx.shape_inference.infer_shapes(proto).graph
    values = (*shaped.value_info, *shaped.input)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    whole = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    nodes: list[Any] = []

    def add(kind: str, old: Any, inputs: list[str], output: str, **about: Any) -> None:
        made = onnx.helper.make_node(
            kind, inputs, [output], f"{old.name}.{len(nodes)}", **about
        )
        made.metadata_props.extend(old.metadata_props)
        nodes.append(made)

    for node in proto.graph.node:
        kind = types.get(node.input[0]) if node.input else None
        if node.op_type not in ("CumSum", "Clip") or kind not in whole:
            nodes.append(node)
            continue
        source, result = node.input[0], node.output[0]
        if node.op_type == "CumSum":
            add("Cast", node, [source], f"{result}.float", to=onnx.TensorProto.FLOAT)
            sums = onnx.NodeProto()
            sums.CopyFrom(node)
            sums.input[0], sums.output[0] = f"{result}.float", f"{result}.sum"
            nodes.append(sums)
            add("Cast", node, [f"{result}.sum"], result, to=kind)
            continue
        bounds = [*node.input[1:], "", ""][:2]
        steps = [
            (op, bound)
            for op, bound in zip(("Max", "Min"), bounds, strict=True)
            if bound
        ]
        for i, (op, bound) in enumerate(steps):
            last = i == len(steps) - 1
            output = result if last else f"{result}.{op}"
            add(op, node, [source, bound], output)
            source = output
        if not steps:
            add("Identity", node, [source], result)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(copies)
