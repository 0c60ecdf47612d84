"""What a bfloat16 graph computes, in ONNX Runtime on a CPU, which has no bfloat16 products.

The graph is rewritten in float32: every tensor that was bfloat16 is rounded to bfloat16 (to nearest even)
as soon as it is computed. That is what a kernel does that sums in float32 and rounds its result once; kernels
that fuse several operators round less often, and no kernel sums in the same order.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm.bundle import GRAPH
from edgelm.errors import require
from edgelm.export.editor import HALVES
from edgelm.export.graph import save
from edgelm.runtimes.session import OnnxSession

if TYPE_CHECKING:
    import onnx

FLOAT, BFLOAT16 = 1, HALVES["bf16"]
# For the manifest.
CHECKED = (
    "ONNX Runtime on a CPU, which has no bfloat16 products: the graph in float32, "
    "every bfloat16 result rounded to bfloat16; no bfloat16 kernel has run"
)


def open_here(path: Path, threads: int | None = None) -> OnnxSession:
    """A graph in ONNX Runtime on the CPU; one with bfloat16 as its float32 stand-in.

    Args:
        path: The graph.
        threads: Of one inference; all cores if not given.

    Raises:
        SessionError: It cannot be loaded.
    """
    onnx = require("onnx", "export")
    light = onnx.load(path, load_external_data=False)
    if not _bfloat16(light):
        return OnnxSession(path, "CPUExecutionProvider", threads)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".rounded.") as work:
        stand_in = Path(work) / GRAPH
        save(rounded(onnx.load(path)), stand_in)
        return OnnxSession(stand_in, "CPUExecutionProvider", threads)


def rounded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph with bfloat16, in float32 with the same roundings.

    Args:
        proto: The graph; unchanged.

    Returns:
        A float32 graph of the same interface.
    """
    onnx = require("onnx", "export")
    numpy = onnx.numpy_helper
    small = _bfloat16(proto)
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    del graph.value_info[:]
    for tensor in graph.initializer:
        if tensor.data_type == BFLOAT16:
            value = numpy.to_array(tensor).astype("float32")
            tensor.CopyFrom(numpy.from_array(value, tensor.name))
    nodes: list[Any] = []
    for node in graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in small:
                continue
            first, second = f"{name}.exact", f"{name}.rounded"
            node.output[i] = first
            if node.op_type == "Cast":
                _cast_to(node, FLOAT)
            cast = onnx.helper.make_node
            nodes.append(cast("Cast", [first], [second], second, to=BFLOAT16))
            nodes.append(cast("Cast", [second], [name], f"{second}.back", to=FLOAT))
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return made


def _bfloat16(proto: onnx.ModelProto) -> set[str]:
    """Names of the tensors that are bfloat16, constants aside."""
    onnx = require("onnx", "export")
    shaped = onnx.shape_inference.infer_shapes(proto).graph
    return {
        value.name
        for value in (*shaped.value_info, *shaped.output)
        if value.type.tensor_type.elem_type == BFLOAT16
    }


def _cast_to(node: Any, kind: int) -> None:
    for attribute in node.attribute:
        if attribute.name == "to":
            attribute.i = kind
