"""float16 or bfloat16 for GPUs: the matrix products, and what only reshapes or scales their results.

Layer norms, softmax, masks, residual sums, pooling and heads stay float32. Every change of type is a Cast
in the graph, and every operator's inputs have one type: TensorRT 11 builds nothing else, and takes the
precision from the graph alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ExportError, require
from edgelm.export.audit import wanted_precisions, write
from edgelm.export.editor import HALVES, LARGEST, Editor, layer, tables
from edgelm.export.graph import weighted_products
from edgelm.manifest import Graph

if TYPE_CHECKING:
    import onnx

FLOAT = 1
# The next text may bring more than the calibration text did.
_LIMIT = LARGEST / 2
# More than this share of a weight lost to rounding: it lies among float16's subnormal numbers.
_LOST = 0.01
# These are of two bytes where all that they read is.
_FOLLOW = {"Add", "Mul", "Gelu", "Relu", "Reshape", "Transpose", "Split", "Slice"}
_FOLLOW |= {"Squeeze", "Unsqueeze", "Expand", "Identity", "Concat"}


def write_half(
    source: Path,
    path: Path,
    feeds: Iterable[Mapping[str, NDArray[Any]]],
    kind: str = "fp16",
) -> tuple[Graph, dict[str, str]]:
    """Write a graph whose matrix products are of two bytes, and whose embedding tables are stored so.

    Args:
        source: A float32 graph.
        path: The file to write.
        feeds: Calibration batches, by which it is checked that every number fits float16;
            bfloat16 has float32's range, and nothing is checked.
        kind: ``fp16`` or ``bf16``.

    Returns:
        The new graph's interface; and what stayed float32 because it does not fit: the
        layer and its operator, and why.

    Raises:
        ExportError: A weight, or what calibration gave, is not finite, or the graph is
            not what was asked for.
    """
    editor = Editor(source)
    floats = _floats(editor.proto)
    heads = {head.name for head in weighted_products(editor.proto)[1]}
    last = {output.name for output in editor.graph.output}
    apart = {n.name for n in editor.graph.node if last & set(n.output)} | heads
    candidates = _half_nodes(editor, floats, apart)
    why: dict[str, str] = {}
    if kind == "fp16":
        largest = _largest(editor, candidates, floats, feeds)
        why = {
            node.name: reason
            for node in (*candidates, *tables(editor.proto, editor.constants))
            if (reason := _misfit(editor, node, floats, largest))
        }
    products = {product.name for product in weighted_products(editor.proto)[0]}
    wanted = wanted_precisions(editor, kind, products & set(why))
    wanted |= {name: "fp32" for name in why if name in wanted}
    kept = {
        f"{layer(n)} ({n.op_type})": why[n.name]
        for n in editor.graph.node
        if n.name in why
    }
    _convert(editor, _half_nodes(editor, floats, apart | set(why)), floats, kind)
    editor.halve_tables(kind, keep=why)
    return write(editor.finish(), path, wanted), kept


def _floats(proto: onnx.ModelProto) -> set[str]:
    """Names of the float32 tensors of a graph, constants too."""
    onnx = require("onnx", "export")
    shaped = onnx.shape_inference.infer_shapes(proto).graph
    values = (*shaped.value_info, *shaped.input, *shaped.output)
    names = {v.name for v in values if v.type.tensor_type.elem_type == FLOAT}
    return names | {t.name for t in shaped.initializer if t.data_type == FLOAT}


def _half_nodes(editor: Editor, floats: set[str], apart: set[str]) -> list[Any]:
    """The nodes that are of two bytes, in the graph's order."""
    found: list[Any] = []
    half: set[str] = set()
    for node in editor.graph.node:
        read = [n for n in node.input if n in floats and n not in editor.constants]
        follows = node.op_type in _FOLLOW and read and half.issuperset(read)
        if node.name not in apart and (node.op_type == "MatMul" or follows):
            found.append(node)
            half.update(node.output)
    return found


def _largest(
    editor: Editor,
    nodes: list[Any],
    floats: set[str],
    feeds: Iterable[Mapping[str, NDArray[Any]]],
) -> dict[str, float]:
    """The largest magnitude of each tensor that these nodes read or give."""
    onnx, ort = require("onnx", "export"), require("onnxruntime", "ort")
    names = sorted(
        {name for node in nodes for name in (*node.input, *node.output)}
        & floats - set(editor.constants)
    )
    if not names:
        return {}
    probe = onnx.ModelProto()
    probe.CopyFrom(editor.proto)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    largest = dict.fromkeys(names, 0.0)
    for given in feeds:
        for name, value in zip(names, session.run(names, dict(given)), strict=True):
            size = float(np.abs(value).max()) if value.size else 0.0
            if not np.isfinite(size):
                raise ExportError(
                    f"On calibration text the tensor {name} is not finite: the model overflows in float32."
                )
            largest[name] = max(largest[name], size)
    return largest


def _misfit(
    editor: Editor, node: Any, floats: set[str], largest: Mapping[str, float]
) -> str:
    """Why a node cannot be float16; empty if it can."""
    for name in (*node.input, *node.output):
        if name not in floats:
            continue
        if name not in editor.constants:
            if largest.get(name, 0.0) > _LIMIT:
                return f"values up to {largest[name]:.3g} on calibration text"
            continue
        value = editor.constants[name]
        if value.size and np.abs(value).max() > LARGEST:
            return f"weights up to {np.abs(value).max():.3g}"
        lost = np.linalg.norm(value - value.astype(np.float16).astype(np.float32))
        if lost > _LOST * np.linalg.norm(value):
            return "weights too small for float16"
    return ""


def _convert(editor: Editor, nodes: list[Any], floats: set[str], kind: str) -> None:
    """Make nodes of two bytes, with casts wherever a tensor passes from one type to the other."""
    inside = {node.name for node in nodes}
    half = {output for node in nodes for output in node.output}
    cast: set[str] = set()

    def other(name: str, suffix: str, to: int) -> str:
        if name not in cast:
            made = editor.node("Cast", [name], f"{name}.{suffix}", to=to)
            editor.follow(name, made)
            cast.add(name)
        return f"{name}.{suffix}"

    for node in editor.graph.node:
        for i, name in enumerate(node.input):
            if name not in floats:
                continue
            if node.name not in inside:
                if name in half:
                    node.input[i] = other(name, "fp32", FLOAT)
            elif name in editor.constants:
                node.input[i] = editor.half(name, kind)
            elif name not in half:
                node.input[i] = other(name, kind, HALVES[kind])
