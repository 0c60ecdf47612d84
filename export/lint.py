"""What TensorRT's parser takes and what it does not, checked before a graph reaches a device.

The operators and their types are those of the parser's own table (github.com/onnx/onnx-tensorrt,
docs/operators.md of TensorRT 10.0 and 10.1; what 10.15 adds is not used). These rules say that nothing known
to fail is in a graph; that an engine is built from it, only the device shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgelm.errors import ExportError, require
from edgelm.targets.board import version_numbers

if TYPE_CHECKING:
    import onnx

# The newest opset that the parser reads, from a version of TensorRT on.
_OPSETS = (((8, 4), 17), ((9, 0), 19), ((10, 0), 20), ((10, 15), 24), ((11, 0), 25))
_OLDEST_OPSET = 9
# The oldest that is known to have bfloat16 (github.com/NVIDIA/TensorRT issue 3583).
_BFLOAT16 = (9, 1)

_FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16"}
_NUMBERS = {*_FLOATS, "INT32", "INT64"}
_BOOLS = {"BOOL"}
_ANY = {*_NUMBERS, *_BOOLS}
_OF_FLOATS = """
Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv Cos Cosh CumSum Einsum Elu
Erf Exp Floor Gemm GlobalAveragePool HardSigmoid HardSwish InstanceNormalization LayerNormalization LeakyRelu
Log LogSoftmax LpNormalization MatMul MaxPool Mish Pow PRelu QuantizeLinear Reciprocal Round Selu Sigmoid Sin
Sinh Softmax Softplus Softsign Sqrt Tan Tanh
"""
_OF_NUMBERS = """
Abs Add ArgMax ArgMin Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg Pad
Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu ScatterElements ScatterND Sign Sub Sum TopK
"""
_OF_ANY = """
Concat Constant ConstantOfShape Expand Flatten Gather GatherElements GatherND Identity Reshape Shape Size Slice
Split Squeeze Tile Transpose Trilu Unsqueeze Where
"""
_OF_BOOLS = "And Not Or Xor"
_TYPES: dict[str, set[str]] = {
    **dict.fromkeys(_OF_FLOATS.split(), _FLOATS),
    **dict.fromkeys(_OF_NUMBERS.split(), _NUMBERS),
    **dict.fromkeys(_OF_ANY.split(), _ANY),
    **dict.fromkeys(_OF_BOOLS.split(), _BOOLS),
    "Cast": {*_ANY, "UINT8"},
    "DequantizeLinear": {"INT8"},
}
# The input whose type counts, where it is not the first.
_TYPED = {"Where": 1}
# Operators whose result has a size that only the data tell.
_DATA_DEPENDENT = {"NonZero", "Unique", "Compress", "NonMaxSuppression"}
# Inputs that must be constants.
_CONSTANT_INPUTS = {
    **dict.fromkeys((op for op in _TYPES if op.startswith("Reduce")), (1,)),
    "CumSum": (1,),
    "Slice": (3,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "TopK": (1,),
    "QuantizeLinear": (1, 2),
    "DequantizeLinear": (1, 2),
}
# Inputs that are shapes: they may be computed from shapes, not from data.
_SHAPE_INPUTS = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Slice": (1, 2),
    "Tile": (1,),
}
# In two bytes their sums, squares or exponents lose or overflow; edgelm keeps them float32.
_WIDE = {"LayerNormalization", "Softmax", "LogSoftmax", "Pow", "Exp", "Sqrt"}
_WIDE |= {op for op in _TYPES if op.startswith("Reduce")}
# The parser's limit of TopK's count.
_MOST_TOP = 3840
# The dynamic axes that optimisation profiles bound.
AXES = ("batch", "sequence")
_KNOWN = " and ".join(AXES)


@dataclass(frozen=True)
class Problem:
    """Something in a graph that TensorRT will not take.

    Attributes:
        rule: Which rule it breaks: ``operator``, ``opset``, ``type``, ``quantisation``,
            ``shape``, ``axis``, ``constant``, ``float16`` (or bfloat16).
        node: Name of the node or tensor; empty for the whole graph.
        operator: Its operator, if it is a node.
        what: What is wrong, in a sentence.
    """

    rule: str
    node: str
    operator: str
    what: str


def newest_opset(tensorrt: str) -> int:
    """The newest opset that the parser of a TensorRT version reads.

    Raises:
        ExportError: The version is older than any that is known.
    """
    version = version_numbers(tensorrt)
    fitting = [opset for least, opset in _OPSETS if version >= least]
    if not fitting:
        raise ExportError(
            f"TensorRT {tensorrt} is older than 8.4; its rules are not known."
        )
    return fitting[-1]


def lint(path: Path, tensorrt: Sequence[str]) -> list[Problem]:
    """Check a graph against the rules of TensorRT.

    Args:
        path: The ONNX file.
        tensorrt: Versions that shall read it.

    Returns:
        Every problem found; none if the graph may pass.

    Raises:
        ExportError: The file is no valid ONNX graph.
    """
    onnx = require("onnx", "export")
    try:
        proto = onnx.load(path, load_external_data=False)
        graph = _Graph(onnx, proto)
    except Exception as error:  # protobuf's and onnx's exceptions have no common base
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"{path} is no valid ONNX graph: {reason}") from error
    if not proto.graph.node:  # an empty file is a valid message
        raise ExportError(f"{path} is no valid ONNX graph: it holds no operators.")
    problems = [*_opset(proto, tensorrt), *_inputs(proto), *_bfloat16(graph, tensorrt)]
    for rule in RULES:
        for node in proto.graph.node:
            problems += rule(graph, node)
    return problems


def check_graph(path: Path, tensorrt: Sequence[str]) -> None:
    """Refuse a graph that TensorRT will not take.

    Raises:
        ExportError: The first problem, and how many there are.
    """
    problems = lint(path, tensorrt)
    if problems:
        more = f" ({len(problems)} such problems in all)" if len(problems) > 1 else ""
        raise ExportError(
            f"TensorRT {' or '.join(tensorrt)} will not build this graph: {problems[0].what}{more} "
            "edgelm lint GRAPH shows all. Export for another target."
        )


class _Graph:
    """A graph with the types of its tensors and who makes them."""

    def __init__(self, onnx: Any, proto: onnx.ModelProto) -> None:
        self.onnx = onnx
        self.constants = {t.name: t for t in proto.graph.initializer}
        self.makers = {o: n for n in proto.graph.node for o in n.output}
        self.outputs = {o.name for o in proto.graph.output}
        shaped = onnx.shape_inference.infer_shapes(proto).graph
        name = onnx.TensorProto.DataType.Name
        self.types = {t.name: name(t.data_type) for t in proto.graph.initializer}
        for value in (*shaped.input, *shaped.value_info, *shaped.output):
            self.types[value.name] = name(value.type.tensor_type.elem_type)

    def constant(self, name: str) -> bool:
        """Whether a tensor is known at build time."""
        maker = self.makers.get(name)
        return name in self.constants or (
            maker is not None and maker.op_type == "Constant"
        )

    def value(self, name: str) -> Any:
        """A constant's value; None if its bytes lie in another file."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            return None
        return self.onnx.numpy_helper.to_array(tensor)

    def from_data(self, name: str, seen: set[str]) -> bool:
        """Whether a tensor hangs on the inputs' values, not their shapes alone."""
        if name in seen or self.constant(name):
            return False
        seen.add(name)
        maker = self.makers.get(name)
        if maker is None:
            return True  # an input of the graph
        if maker.op_type in ("Shape", "Size"):
            return False
        return any(self.from_data(i, seen) for i in maker.input if i)


def _problem(rule: str, node: Any, what: str) -> Problem:
    return Problem(rule, node.name, node.op_type, f"{node.op_type} {node.name} {what}")


def _opset(proto: onnx.ModelProto, tensorrt: Sequence[str]) -> Iterator[Problem]:
    for entry in proto.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            continue
        for version in tensorrt:
            newest = newest_opset(version)
            if not _OLDEST_OPSET <= entry.version <= newest:
                reads = f"TensorRT {version} reads {_OLDEST_OPSET} to {newest}"
                what = f"The graph has opset {entry.version}; the parser of {reads}."
                yield Problem("opset", "", "", what)


def _bfloat16(graph: _Graph, tensorrt: Sequence[str]) -> Iterator[Problem]:
    name = next((n for n, kind in graph.types.items() if kind == "BFLOAT16"), None)
    for version in tensorrt:
        if name is not None and version_numbers(version) < _BFLOAT16:
            what = f"{name} is BFLOAT16, which TensorRT {version} is not known to have; 9.1 has it."
            yield Problem("type", name, "", what)


def _inputs(proto: onnx.ModelProto) -> Iterator[Problem]:
    """Dynamic axes are those that profiles bound; nothing else is left open."""
    for value in proto.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param and dim.dim_param not in AXES:
                what = f"The axis {dim.dim_param} of the input {value.name} has no bounds: profiles know {_KNOWN}."
                yield Problem("axis", value.name, "", what)
            elif not dim.dim_param and dim.dim_value < 1:
                what = (
                    f"An axis of the input {value.name} has neither a size nor a name."
                )
                yield Problem("axis", value.name, "", what)


def _operator(graph: _Graph, node: Any) -> Iterator[Problem]:
    if node.domain not in ("", "ai.onnx"):
        yield _problem(
            "operator",
            node,
            f"is of the domain {node.domain}: only plain ONNX operators are read.",
        )
    elif node.op_type in _DATA_DEPENDENT:
        yield _problem("shape", node, "gives a result whose size only the data tell.")
    elif node.op_type not in _TYPES:
        yield _problem(
            "operator",
            node,
            "is not among the operators that the parser is known to read.",
        )


def _type(graph: _Graph, node: Any) -> Iterator[Problem]:
    allowed = _TYPES.get(node.op_type)
    if allowed is None:
        return
    place = _TYPED.get(node.op_type, 0)
    if node.op_type in ("Constant", "ConstantOfShape"):
        name = node.output[0]
    elif place < len(node.input):
        name = node.input[place]
    else:
        return
    found = graph.types.get(name, "UNDEFINED")
    if node.op_type in ("Shape", "Size"):
        return
    if found not in allowed:
        yield _problem(
            "type",
            node,
            f"reads {found}; the parser takes {', '.join(sorted(allowed))}.",
        )
    for output in node.output:
        kind = graph.types.get(output)
        if kind == "UINT8" and output not in graph.outputs:
            yield _problem(
                "type",
                node,
                "gives UINT8, which only the graph's inputs and outputs may be.",
            )
        if kind == "INT8" and node.op_type != "QuantizeLinear":
            yield _problem("type", node, "gives INT8, which only QuantizeLinear may.")
        if kind == "DOUBLE":
            yield _problem(
                "type", node, "gives DOUBLE, which TensorRT rounds to FLOAT."
            )


def _present(node: Any, places: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The inputs of a node at some places, where they are given."""
    for place in places:
        if place < len(node.input) and node.input[place]:
            yield place, node.input[place]


def _constants(graph: _Graph, node: Any) -> Iterator[Problem]:
    for place, name in _present(node, _CONSTANT_INPUTS.get(node.op_type, ())):
        if not graph.constant(name):
            yield _problem(
                "constant", node, f"has an input {place} that is not a constant."
            )
    for name in node.input:
        value = graph.value(name)
        if value is None or value.dtype.kind != "f":
            continue
        if not np.isfinite(value).all():
            what = f"has the constant {name} with numbers that are not finite."
            yield _problem("constant", node, what)
    if node.op_type == "LayerNormalization" and len(node.output) > 1:
        yield _problem("operator", node, "has more than its first output.")
    if node.op_type == "TopK":
        count = graph.value(node.input[1])
        if count is not None and int(count.max()) >= _MOST_TOP:
            yield _problem("constant", node, f"asks for {_MOST_TOP} or more.")


def _quantisation(graph: _Graph, node: Any) -> Iterator[Problem]:
    """Levels are int8 and symmetric; activations have one scale, weights one a channel."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
        return
    scale = graph.value(node.input[1])
    values = graph.constants.get(node.input[0])
    zero = node.input[2] if len(node.input) > 2 else ""
    kind, levels = graph.types.get(zero), graph.value(zero)
    wrong = []
    if scale is not None and not (np.isfinite(scale).all() and (scale > 0).all()):
        wrong.append("has a scale that is not positive and finite.")
    if not zero and node.op_type == "QuantizeLinear":
        wrong.append("has no zero point, so its levels would be UINT8.")
    if zero and kind != "INT8":
        wrong.append(f"has a zero point of {kind}; levels must be INT8.")
    if levels is not None and levels.any():
        wrong.append("has a zero point that is not 0: levels must be symmetric.")
    if scale is not None and scale.size > 1:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        if values is None:
            wrong.append("has a scale a channel; activations take one scale.")
        elif scale.ndim != 1 or values.dims[axis] != scale.size:
            wrong.append("has scales that do not go with its channels.")
    if node.op_type == "DequantizeLinear" and values is None:
        maker = graph.makers.get(node.input[0])
        if maker is None or maker.op_type != "QuantizeLinear":
            wrong.append("reads neither a constant nor a QuantizeLinear.")
    for what in wrong:
        yield _problem("quantisation", node, what)


def _shape(graph: _Graph, node: Any) -> Iterator[Problem]:
    places = _present(node, _SHAPE_INPUTS.get(node.op_type, ()))
    if any(graph.from_data(name, set()) for _, name in places):
        yield _problem("shape", node, "takes a shape from the data, not from shapes.")


def _float16(graph: _Graph, node: Any) -> Iterator[Problem]:
    kind = graph.types.get(node.input[0]) if node.op_type in _WIDE else None
    if kind in ("FLOAT16", "BFLOAT16"):
        what = f"is in {kind.lower()}, where it loses or overflows; keep it in float32."
        yield _problem("float16", node, what)


RULES: tuple[Callable[[_Graph, Any], Iterator[Problem]], ...] = (
    _operator,
    _type,
    _constants,
    _quantisation,
    _shape,
    _float16,
)
