"""Which precision every weight of a graph really has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from edgelm.errors import ExportError, require
from edgelm.export.editor import LARGE_ROWS, Editor, layer, tables
from edgelm.export.graph import describe, save, weighted_products
from edgelm.manifest import Graph

if TYPE_CHECKING:
    import onnx

_MOVES = ("Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose")
_BLOCKS = ("MatMulNBits", "GatherBlockQuantized")
_DTYPES = {1: "fp32", 10: "fp16", 3: "int8", 2: "uint8", 16: "bf16"}


@dataclass(frozen=True)
class Weighted:
    """Something of a graph that has weights.

    Attributes:
        node: Name of its node.
        layer: The module it comes from, as the checkpoint calls it.
        kind: A matrix product, a product that gives the answer, or an embedding table.
        precision: What it is computed in; for tables, what it is stored in.
        weights: How many numbers.
    """

    node: str
    layer: str
    kind: Literal["product", "head", "table"]
    precision: str
    weights: int


def audit(proto: onnx.ModelProto) -> list[Weighted]:
    """Everything with weights in a graph of any precision, in the graph's order."""
    constants = {t.name: t for t in proto.graph.initializer}
    makers = {output: n for n in proto.graph.node for output in n.output}
    last = {output.name for output in proto.graph.output}
    for node in reversed(proto.graph.node):
        if node.op_type in ("Add", "Cast") and node.output[0] in last:
            last.update(node.input)

    def origin(name: str) -> Any:
        while name not in constants and name in makers:
            if makers[name].op_type not in _MOVES:
                return None
            name = makers[name].input[0]
        return constants.get(name)

    def whole(name: str) -> bool:
        maker = makers.get(name)
        return maker is not None and maker.op_type == "DequantizeLinear"

    found = []
    for node in proto.graph.node:
        kind: Any = "product"
        if node.op_type in ("MatMul", "Gemm", "MatMulInteger"):
            weight = origin(node.input[1])
            if weight is None:
                continue
            precision = _DTYPES.get(weight.data_type, "other")
            if precision == "int8" and node.op_type != "MatMulInteger":
                precision = "int8" if whole(node.input[0]) else "int8-weights"
            if node.op_type == "Gemm" or node.output[0] in last:
                kind = "head"
            count = int(np.prod(weight.dims))
        elif node.op_type == "MatMulNBits":
            about = {a.name: a.i for a in node.attribute}
            precision = f"int{about['bits']}-weights"
            count = about["K"] * about["N"]
        elif node.op_type == "MoE":
            experts = [constants[node.input[i]] for i in (2, 4)]
            precision = _DTYPES.get(experts[0].data_type, "other")
            count = sum(int(np.prod(weight.dims)) for weight in experts)
        elif node.op_type == "GatherBlockQuantized":
            about, kind = {a.name: a.i for a in node.attribute}, "table"
            precision = f"int{about['bits']}"
            stored = int(np.prod(constants[node.input[0]].dims))
            count = stored * (8 // about["bits"])
        elif node.op_type == "Gather" and node.input[0] in constants:
            weight, kind = constants[node.input[0]], "table"
            # The steps of an int8 table are a table of one column.
            if len(weight.dims) != 2 or weight.dims[1] < 2:
                continue
            precision = _DTYPES.get(weight.data_type, "other")
            count = int(np.prod(weight.dims))
        else:
            continue
        found.append(Weighted(node.name, layer(node), kind, precision, count))
    return found


def wanted_precisions(
    editor: Editor,
    precision: str,
    keep: Collection[str] = (),
    stored: str | None = None,
    table_bits: int = 8,
) -> dict[str, str]:
    """The precision that each weighted product and table shall have, by name of its node.

    Args:
        editor: A float32 graph, not changed yet.
        precision: Of every product that is no head.
        keep: Names of products that stay float32.
        stored: Of the tables; the products' own, int8 for integers, if not given.
        table_bits: Of large tables, where products are integers.

    Raises:
        ExportError: What is to be kept is no weighted product.
    """
    products, heads = weighted_products(editor.proto)
    names = [product.name for product in products]
    if unknown := sorted(set(keep) - set(names)):
        raise ExportError(f"The graph has no weighted product {unknown[0]} to keep.")
    wanted = dict.fromkeys(names, precision) | dict.fromkeys(keep, "fp32")
    wanted |= dict.fromkeys((head.name for head in heads), "fp32")
    if stored is None:
        stored = "int8" if precision.startswith("int") else precision
    rows = tables(editor.proto, editor.constants)
    wanted |= dict.fromkeys((gather.name for gather in rows), stored)
    if table_bits == 4:
        large = (g for g in rows if len(editor.constants[g.input[0]]) >= LARGE_ROWS)
        wanted |= dict.fromkeys((gather.name for gather in large), "int4")
    return wanted


def write(proto: onnx.ModelProto, path: Path, wanted: Mapping[str, str]) -> Graph:
    """Write a graph, having made sure that it is what was asked for.

    Args:
        proto: The graph.
        path: The file to write.
        wanted: What `wanted_precisions` gave.

    Returns:
        The graph's interface.

    Raises:
        ExportError: A product or a table is missing or has another precision, or a
            scale is not a positive finite number.
    """
    onnx = require("onnx", "export")
    found = {entry.node: entry for entry in audit(proto)}
    wrong = [name for name, due in wanted.items() if _of(found, name) != due]
    if wrong:
        due = Counter(wanted.values())
        done = Counter(_of(found, name) for name in wanted)
        raise ExportError(
            f"The graph is not what was asked for: {wrong[0]} is {_of(found, wrong[0])} instead of "
            f"{wanted[wrong[0]]}. Due: {_counted(due)}; found: {_counted(done)}."
        )
    _check_scales(proto)
    save(proto, path)
    onnx.checker.check_model(str(path), full_check=True)
    return describe(proto, path.name)


def _of(found: Mapping[str, Weighted], name: str) -> str:
    return found[name].precision if name in found else "missing"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _check_scales(proto: onnx.ModelProto) -> None:
    """Scales of levels must be finite and not zero; those of a quantiser positive."""
    onnx = require("onnx", "export")
    constants = {t.name: t for t in proto.graph.initializer}
    for node in proto.graph.node:
        place = {"QuantizeLinear": 1, "DequantizeLinear": 1}
        place |= dict.fromkeys(_BLOCKS, 2)
        name = node.input[place.get(node.op_type, 0)] if node.input else ""
        if node.op_type not in place or name not in constants:
            continue
        scale = onnx.numpy_helper.to_array(constants[name])
        # These have no level beside the lowest one: their steps may be negative.
        size = np.abs(scale) if node.op_type in _BLOCKS else scale
        if not (np.isfinite(scale).all() and (size > 0).all()):
            raise ExportError(
                f"The scales of {layer(node)} are not all positive and finite."
            )
