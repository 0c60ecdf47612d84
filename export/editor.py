"""Changes of a graph, as every precision makes them."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ExportError, require
from edgelm.export.rounding import pack, quantise_blocks, quantise_weights

if TYPE_CHECKING:
    import onnx

# A table of fewer rows gains nothing by being int8.
LEAST_ROWS = 32
# ONNX's number of each float type of two bytes.
HALVES = {"fp16": 10, "bf16": 16}
# Of float16.
LARGEST = 65504.0
# One of fewer gains nothing by having 4 bits: positions, which every text reads.
LARGE_ROWS = 4096
# Numbers of a row that share a step.
TABLE_BLOCK = 64
# The domain of ONNX Runtime's own operators.
VENDOR = "com.microsoft"


class Editor:
    """Changes a graph in place; `finish` puts it together.

    Attributes:
        proto: The graph.
        constants: Every constant by name; what nothing reads any more is dropped.
    """

    def __init__(self, source: Path) -> None:
        """Read a float32 graph.

        Raises:
            ExportError: A weight is not finite.
        """
        self.onnx = require("onnx", "export")
        self.proto: onnx.ModelProto = self.onnx.load(source)
        self.graph = self.proto.graph
        self.constants: dict[str, NDArray[Any]] = {
            t.name: self.onnx.numpy_helper.to_array(t) for t in self.graph.initializer
        }
        self._added: dict[str, list[Any]] = defaultdict(
            list
        )  # by the tensor they follow
        self._replaced: dict[str, list[Any]] = {}  # by the node's first output
        self._refuse_broken_weights()

    def _refuse_broken_weights(self) -> None:
        for node in self.graph.node:
            if node.op_type not in ("MatMul", "Gemm", "Gather", "LayerNormalization"):
                continue  # a mask may well hold an infinity
            for name in node.input:
                value = self.constants.get(name)
                if value is None or value.dtype != np.float32:
                    continue
                broken = value.size - np.count_nonzero(np.isfinite(value))
                if broken:
                    raise ExportError(
                        f"{broken} of {value.size} weights of {layer(node)} are not finite: "
                        "the checkpoint is damaged. Make it again."
                    )

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant, and give its name back."""
        self.constants[name] = value
        return name

    def node(self, kind: str, inputs: list[str], output: str, **settings: Any) -> Any:
        """A node that is not in the graph yet."""
        return self.onnx.helper.make_node(
            kind, inputs, [output], name=f"{output}.{kind}", **settings
        )

    def follow(self, tensor: str, *nodes: Any) -> None:
        """Put nodes behind a tensor; behind the constants for an empty name."""
        self._added[tensor] += nodes

    def replace(self, old: Any, *nodes: Any) -> None:
        """Put nodes in another's place; the first of them takes its name and its layer."""
        nodes[0].name = old.name
        nodes[0].metadata_props.extend(old.metadata_props)
        self._replaced[old.output[0]] = list(nodes)

    def drop(self, *old: Any) -> None:
        """Leave nodes out."""
        self._replaced |= {node.output[0]: [] for node in old}

    def quantise_tables(self, bits: int = 8) -> None:
        """Embedding tables that the graph reads by row: int8, each row with a step of its own.

        Args:
            bits: With 4, large tables become ONNX Runtime's GatherBlockQuantized, each
                `TABLE_BLOCK` numbers of a row with a step of their own, in float16.
        """
        for gather in tables(self.proto, self.constants):
            if bits == 4 and len(self.constants[gather.input[0]]) >= LARGE_ROWS:
                self._quantise_table_by_blocks(gather)
                continue
            name, out = gather.input[0], gather.output[0]
            table = np.ascontiguousarray(self.constants[name].T)
            levels, steps = quantise_weights(table)
            gather.input[0] = self.constant(f"{name}.int8", levels.T.copy())
            gather.output[0] = f"{out}.int8"
            step = self.constant(f"{name}.step", steps[:, None])
            self.follow(
                f"{out}.int8",
                self.node("Cast", [f"{out}.int8"], f"{out}.levels", to=1),
                self.node("Gather", [step, gather.input[1]], f"{out}.steps"),
                self.node("Mul", [f"{out}.levels", f"{out}.steps"], out),
            )

    def half(self, name: str, kind: str) -> str:
        """A constant in a type of two bytes, rounded to nearest even; gives its name."""
        dtype = self.onnx.helper.tensor_dtype_to_np_dtype(HALVES[kind])
        return self.constant(f"{name}.{kind}", self.constants[name].astype(dtype))

    def halve_tables(self, kind: str = "fp16", keep: Collection[str] = ()) -> None:
        """Embedding tables that the graph reads by row: stored in two bytes, read as float32.

        Args:
            kind: One of `HALVES`.
            keep: Names of the nodes whose tables stay float32.
        """
        for gather in tables(self.proto, self.constants):
            if gather.name in keep:
                continue
            out = gather.output[0]
            gather.input[0] = self.half(gather.input[0], kind)
            gather.output[0] = f"{out}.{kind}"
            self.follow(
                f"{out}.{kind}", self.node("Cast", [f"{out}.{kind}"], out, to=1)
            )

    def _quantise_table_by_blocks(self, gather: Any) -> None:
        """The operator's definition: github.com/microsoft/onnxruntime, docs/ContribOperators.md."""
        name, out = gather.input[0], gather.output[0]
        table = self.constants[name]
        if table.shape[1] % TABLE_BLOCK:
            raise ExportError(
                f"The rows of {layer(gather)} are {table.shape[1]} wide; 4 bits take a multiple of {TABLE_BLOCK}. "
                "Leave --embedding-bits at 8."
            )
        levels, steps = quantise_blocks(table.T, 4, TABLE_BLOCK, np.float16)
        inputs = [
            self.constant(f"{name}.int4", pack(levels, 4).reshape(len(table), -1)),
            gather.input[1],
            self.constant(f"{name}.step", steps.astype(np.float16)),
        ]
        node = self.node(
            "GatherBlockQuantized",
            inputs,
            f"{out}.fp16",
            domain=VENDOR,
            bits=4,
            block_size=TABLE_BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        cast = self.node("Cast", [f"{out}.fp16"], out, to=1)
        self.replace(gather, node, cast)
        self.use_vendor()

    def use_vendor(self) -> None:
        """Declare ONNX Runtime's own operators."""
        if all(opset.domain != VENDOR for opset in self.proto.opset_import):
            self.proto.opset_import.append(self.onnx.helper.make_opsetid(VENDOR, 1))

    def finish(self) -> onnx.ModelProto:
        """Put the new nodes where what they read is there, and drop what nothing reads."""
        nodes: list[Any] = []

        def put(node: Any) -> None:
            nodes.append(node)
            behind(node.output)

        def behind(tensors: Iterable[str]) -> None:
            for tensor in tensors:
                for node in self._added.pop(tensor, []):
                    put(node)

        behind(("", *(i.name for i in self.graph.input)))
        for old in self.graph.node:
            for node in self._replaced.get(old.output[0], [old]):
                put(node)
        copies = [self.onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
        del self.graph.node[:]
        self.graph.node.extend(copies)
        used = {name for node in copies for name in node.input}
        del self.graph.initializer[:]
        self.graph.initializer.extend(
            self.onnx.numpy_helper.from_array(np.asarray(value), name)
            for name, value in self.constants.items()
            if name in used
        )
        # Given shapes, ONNX Runtime joins sums and layer norms; benchmarks/graph_shapes.py measures
        # what that is worth.
        del self.graph.value_info[:]
        return self.proto


def tables(proto: onnx.ModelProto, constants: dict[str, NDArray[Any]]) -> list[Any]:
    """The nodes that read rows of large float32 tables: embeddings."""
    found = []
    for node in proto.graph.node:
        table = constants.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or table.ndim != 2 or table.dtype != np.float32:
            continue
        if len(table) >= LEAST_ROWS and not any(a.i for a in node.attribute):
            found.append(node)
    return found


def layer(node: Any) -> str:
    """The module that a node comes from, as the checkpoint calls it; else the node's name."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            name = next((s for s in reversed(scopes[:-1]) if s), "")
            if name:
                return str(name).removeprefix("model.")
    return str(node.name)
