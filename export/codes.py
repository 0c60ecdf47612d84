"""Packed codes as a second output of an encoder's graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgelm.errors import ExportError, require
from edgelm.export.graph import describe, random_inputs, read_graph, save
from edgelm.export.rounded import open_here
from edgelm.manifest import Graph
from edgelm.runtimes.codes import GROUPS, Coder

OUTPUT = "codes"
# Of random inputs at most this share of bits may differ from numpy's: those whose values
# are so near to 0 that the order of a sum decides.
_MAX_DIFFERENT = 1e-3


def add_codes(path: Path, coder: Coder, vocabulary: int) -> Graph:
    """Let a graph give packed codes beside its embeddings, as `Coder.encode` gives them.

    Args:
        path: The graph's file, which is replaced. Its first output is the embeddings.
        coder: What to add; it stays in float32 whatever the precision of the graph.
        vocabulary: How many tokens there are, to try the graph with.

    Returns:
        The interface, with the output ``codes``, uint8 ``[batch, bits // 8]``.

    Raises:
        ExportError: The graph gives other codes than numpy does.
    """
    onnx = require("onnx", "export")
    proto = onnx.load(path)
    nodes = _Nodes(onnx, proto.graph)
    centred = nodes.add("Sub", proto.graph.output[0].name, nodes.constant(coder.mean))
    found = nodes.sign(nodes.add("MatMul", centred, nodes.constant(coder.encoder)))
    if coder.sweeps:
        found = _improve(nodes, coder, centred, found)
    size = coder.bits // 8
    one = nodes.add("Cast", nodes.add("Greater", found, nodes.zero), to=nodes.float)
    shape = nodes.constant(np.array([-1, size, 8], np.int64))
    weights = nodes.constant(2.0 ** np.arange(7, -1, -1, dtype=np.float32)[:, None])
    packed = nodes.add("MatMul", nodes.add("Reshape", one, shape), weights)
    flat = nodes.constant(np.array([-1, size], np.int64))
    uint8 = onnx.TensorProto.UINT8
    nodes.add("Cast", nodes.add("Reshape", packed, flat), to=uint8, output=OUTPUT)
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info(OUTPUT, uint8, ["batch", size])
    )
    save(proto, path)
    onnx.checker.check_model(str(path))
    _check(path, vocabulary, coder)
    return describe(proto, path.name)


class _Nodes:
    """Nodes and constants at the end of a graph, with names of their own."""

    def __init__(self, onnx: Any, graph: Any) -> None:
        self._onnx = onnx
        self._graph = graph
        self.float = onnx.TensorProto.FLOAT
        self.zero = self.constant(np.zeros(1, np.float32))
        self._one = self.constant(np.ones(1, np.float32))
        self._minus_one = self.constant(-np.ones(1, np.float32))

    def constant(self, value: Any) -> str:
        name = f"coder.{len(self._graph.initializer)}"
        array = np.ascontiguousarray(value)
        self._graph.initializer.append(self._onnx.numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        output = output or f"coder/{kind}.{len(self._graph.node)}"
        node = self._onnx.helper.make_node(kind, inputs, [output], output, **attributes)
        self._graph.node.append(node)
        return output

    def sign(self, values: str) -> str:
        bits = self.add("GreaterOrEqual", values, self.zero)
        return self.add("Where", bits, self._one, self._minus_one)


def _improve(nodes: _Nodes, coder: Coder, centred: str, found: str) -> str:
    """`Coder.improve`, unrolled."""
    size = coder.bits // GROUPS
    groups = [slice(i, i + size) for i in range(0, coder.bits, size)]

    def columns(name: str, group: slice) -> str:
        ends = (np.array([end], np.int64) for end in (group.start, group.stop, 1))
        return nodes.add("Slice", name, *(nodes.constant(end) for end in ends))

    targets = [
        nodes.add("MatMul", centred, nodes.constant(coder.decoder[:, group]))
        for group in groups
    ]
    coupling = [nodes.constant(coder.coupling[:, group]) for group in groups]
    parts = [columns(found, group) for group in groups]
    for _ in range(coder.sweeps):
        for i, target in enumerate(targets):
            whole = nodes.add("Concat", *parts, axis=1)
            others = nodes.add("MatMul", whole, coupling[i])
            parts[i] = nodes.sign(nodes.add("Sub", target, others))
    return nodes.add("Concat", *parts, axis=1)


def _check(path: Path, vocabulary: int, coder: Coder) -> None:
    session = open_here(path)
    names = [tensor.name for tensor in read_graph(path).inputs]
    outputs = session.run(random_inputs(names, 8, 16, vocabulary))
    vectors = next(iter(outputs.values()))
    due = np.unpackbits(coder.encode(vectors), axis=1)
    different = float((due != np.unpackbits(outputs[OUTPUT], axis=1)).mean())
    if different > _MAX_DIFFERENT:
        raise ExportError(
            f"The graph gives other codes than numpy: {100 * different:.2f} % of the bits differ."
        )
