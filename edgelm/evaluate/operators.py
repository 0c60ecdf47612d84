"""What each operator of an encoder's graph is for, told from what it reads and feeds.

No name of a module is looked at, so that every architecture is treated alike:

- attention: what lies between the weighted products whose results meet in a softmax and the weighted
  product behind it, these included;
- ffn: the weighted products behind an attention that are neither its own nor a head, and what lies between them;
- normalise: layer norms and residual sums;
- embedding: from the tables to the first of these;
- pooling: behind the last of these, heads included;
- quantise: what turns numbers into int8 and back, where it is an operator of its own.

What fits none of them is "other".
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelm.export.graph import weighted_products

if TYPE_CHECKING:
    import onnx

OTHER = "other"
GROUPS = ("embedding", "attention", "ffn", "normalise", "quantise", "pooling")

# Operators with weights, and which input these are; the fused ones are ONNX Runtime's own.
_WEIGHTS = {
    "DynamicQuantizeMatMul": 1,
    "FusedGemm": 1,
    "FusedMatMul": 1,
    "Gemm": 1,
    "MatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "MatMulNBits": 1,
    "QGemm": 3,
    "QLinearMatMul": 3,
}
_WHOLE = {"DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
_WHOLE |= {"MatMulNBits", "QGemm", "QLinearMatMul"}
_ATTENTION = {"Attention", "MultiHeadAttention", "QAttention", "PackedAttention"}
_NORMS = ("LayerNormalization", "RMSNormalization")
_QUANTISE = {"DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"}
_MOVES = {"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"}
_TABLES = {"Gather", "GatherBlockQuantized", "EmbedLayerNormalization"}
# Cheap, and nobody's own: they belong to what they feed.
_LIGHT = _MOVES | {"Add", "And", "Clip", "Concat", "ConstantOfShape", "Div", "Equal"}
_LIGHT |= {"Expand", "Gather", "Less", "Mul", "Not", "Range", "Shape", "Slice", "Sub"}
_LIGHT |= {"Split", "Squeeze", "Unsqueeze", "Where"}
# What a layer norm in pieces consists of.
_PIECES = {"Add", "Cast", "Div", "Mul", "Pow", "Reciprocal", "Sqrt", "Sub"}


@dataclass(frozen=True)
class Product:
    """A matrix product with constant weights.

    Attributes:
        inputs: Numbers of a row that it reads.
        outputs: Numbers of a row that it gives.
        whole: Whether it multiplies integers.
    """

    inputs: int
    outputs: int
    whole: bool


@dataclass(frozen=True)
class Operators:
    """A graph's operators, by the names of their nodes.

    Attributes:
        groups: The group of each.
        products: The weighted products of attention and FFN; more than one where a
            runtime joined some.
        kinds: The operator of each.
        weights: The products by the constants that hold their weights.
    """

    groups: dict[str, str]
    products: dict[str, tuple[Product, ...]]
    kinds: dict[str, str]
    weights: dict[str, str]


def find_groups(proto: onnx.ModelProto) -> Operators:
    """Say what each operator of a graph is for.

    Args:
        proto: A graph as exported, or as ONNX Runtime's optimiser left it.
    """
    return _Finder(proto).find()


class _Finder:
    """Nodes by number, in the graph's order; `group` is what is known of them so far."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.nodes = list(proto.graph.node)
        self.constants = {t.name: t for t in proto.graph.initializer}
        self.maker = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self.readers: dict[int, list[int]] = defaultdict(list)
        for i, node in enumerate(self.nodes):
            # The step of a quantiser goes round the product; only what is quantised counts.
            made = {n: self.maker[n] for n in node.input if n in self.maker}
            for j in {j for n, j in made.items() if not self._is_scale(n)}:
                self.readers[j].append(i)
        heads = {head.name for head in weighted_products(proto)[1]}
        self.weights = {
            i: weight
            for i, node in enumerate(self.nodes)
            if (weight := self._weight(node)) is not None
        }
        self.heads = {i for i in self.weights if self._is_head(i, heads)}
        self.body = [i for i in self.weights if i not in self.heads]
        self.group: dict[int, str] = {}

    def find(self) -> Operators:
        for i, node in enumerate(self.nodes):
            if node.op_type in _QUANTISE:
                self.group[i] = "quantise"
        contexts = self._contexts()
        self._attention(contexts)
        # What follows attention; what does not, comes before the first layer.
        self.behind = self._flood(contexts, self._after)
        norms = self._norms()
        self._feed_forward(norms)
        self._normalise(norms)
        self._ends()
        self._adopt()
        names = [node.name for node in self.nodes]
        return Operators(
            {name: self.group.get(i, OTHER) for i, name in enumerate(names)},
            {
                names[i]: (self._product(i),)
                for i in self.body
                if self.group.get(i) in ("attention", "ffn")
            },
            {node.name: node.op_type for node in self.nodes},
            {weight.name: names[i] for i, weight in self.weights.items()},
        )

    def _before(self, i: int) -> list[int]:
        return [self.maker[n] for n in self.nodes[i].input if n in self.maker]

    def _after(self, i: int) -> list[int]:
        return self.readers[i]

    def _flood(
        self,
        seeds: Iterable[int],
        step: Callable[[int], list[int]],
        stop: Callable[[int], bool] = lambda i: False,
    ) -> set[int]:
        """All that is reached from seeds, without going on from where it stops."""
        found: set[int] = set()
        todo = [j for i in seeds for j in step(i)]
        while todo:
            i = todo.pop()
            if i not in found:
                found.add(i)
                todo += [] if stop(i) else step(i)
        return found

    def _weight(self, node: Any) -> Any:
        """A product's constant weights, however they are stored."""
        place = _WEIGHTS.get(node.op_type)
        if place is None or len(node.input) <= place:
            return None
        name = node.input[place]
        while name not in self.constants:
            maker = self.nodes[self.maker[name]] if name in self.maker else None
            if maker is None or maker.op_type not in _MOVES:
                return None
            name = maker.input[0]
        return self.constants[name]

    def _is_head(self, i: int, heads: set[str]) -> bool:
        """A Gemm has a row a text; what only a bias parts from the answer is a head, too."""
        node = self.nodes[i]
        return node.name in heads or node.op_type in ("Gemm", "FusedGemm", "QGemm")

    def _product(self, i: int) -> Product:
        node = self.nodes[i]
        about = {a.name: a.i for a in node.attribute}
        if node.op_type == "MatMulNBits":
            inputs, outputs = about["K"], about["N"]
        else:
            inputs, outputs = self.weights[i].dims
            if about.get("transB"):
                inputs, outputs = outputs, inputs
        whole = node.op_type in _WHOLE or self.weights[i].data_type in (2, 3)
        return Product(int(inputs), int(outputs), whole)

    def _inner(self, i: int) -> bool:
        """Whether a node multiplies two tensors that both depend on the text."""
        return self.nodes[i].op_type in _WEIGHTS and i not in self.weights

    def _contexts(self) -> list[int]:
        """Where softmax meets the values; and fused attention."""
        fused = [i for i, n in enumerate(self.nodes) if n.op_type in _ATTENTION]
        softmax = [i for i, n in enumerate(self.nodes) if n.op_type == "Softmax"]
        seen = self._flood(
            softmax,
            self._after,
            lambda i: self._inner(i) or i in self.weights or self._is_norm(i),
        )
        return fused + sorted(i for i in seen if self._inner(i))

    def _attention(self, contexts: list[int]) -> None:
        inside = set(contexts)
        inside |= self._flood(
            contexts,
            self._before,
            lambda i: (
                i in self.weights or self.nodes[i].op_type == "DynamicQuantizeLinear"
            ),
        )
        behind = self._flood(
            contexts,
            self._after,
            lambda i: i in self.weights or self._is_norm(i) or i in inside,
        )
        out = {i for i in behind if i in self.body}
        # Between the values and the product behind them: only what leads there.
        way = self._flood(out, self._before, lambda i: i in inside) & behind
        for i in inside | out | way | self._epilogue(inside | out):
            self.group.setdefault(i, "attention")

    def _epilogue(self, products: Iterable[int]) -> set[int]:
        """Bias and scale behind weighted products."""
        found: set[int] = set()
        for i in products:
            while i in self.weights or i in found:
                readers = self.readers[i]
                if len(readers) != 1 or not self._with_constants(readers[0], i):
                    break
                i = readers[0]
                found.add(i)
        return found

    def _with_constants(self, i: int, given: int) -> bool:
        """Whether a node only scales, shifts or casts what it is given."""
        node = self.nodes[i]
        others = [
            n for n in node.input if n not in self.nodes[given].output and n != ""
        ]
        return node.op_type in ("Add", "Mul", "Cast") and all(
            n in self.constants or self._is_step(n) for n in others
        )

    def _is_scale(self, name: str) -> bool:
        node = self.nodes[self.maker[name]]
        return bool(node.op_type == "DynamicQuantizeLinear" and name != node.output[0])

    def _is_step(self, name: str) -> bool:
        """Whether a tensor is the step of a quantiser, perhaps times constants."""
        if name not in self.maker:
            return False
        node = self.nodes[self.maker[name]]
        return self._is_scale(name) or (
            node.op_type == "Mul"
            and all(n in self.constants or self._is_step(n) for n in node.input)
        )

    def _is_norm(self, i: int) -> bool:
        return bool(self.nodes[i].op_type.endswith(_NORMS))

    def _norms(self) -> set[int]:
        """Layer norms: one operator, or the pieces around a mean over the last axis."""
        found = {i for i in range(len(self.nodes)) if self._is_norm(i)}
        means = [i for i, n in enumerate(self.nodes) if n.op_type == "ReduceMean"]

        def leaves(i: int) -> bool:
            node = self.nodes[i]
            scaled = any(
                n in self.constants and len(self.constants[n].dims) == 1
                for n in node.input
            )
            return node.op_type not in _PIECES or (node.op_type == "Mul" and scaled)

        for mean in means:
            pieces = self._flood([mean], self._after, leaves)
            pieces = {i for i in pieces if self.nodes[i].op_type in _PIECES}
            squares = {
                i
                for i in self._before(mean)
                if self.nodes[i].op_type == "Pow"
                or (self.nodes[i].op_type == "Mul" and len({*self.nodes[i].input}) == 1)
            }
            found |= {mean} | pieces | squares
        return {i for i in found if i not in self.group and i not in self.weights}

    def _feed_forward(self, norms: set[int]) -> None:
        products = {i for i in self.body if i not in self.group and i in self.behind}

        def stop(i: int) -> bool:
            return i in norms or i in products or self.group.get(i) == "attention"

        ahead = self._flood(products, self._after, stop)
        back = self._flood(products, self._before, stop)
        for i in products | ((ahead & back) - norms) | self._epilogue(products):
            self.group.setdefault(i, "ffn")

    def _normalise(self, norms: set[int]) -> None:
        for i, node in enumerate(self.nodes):
            made = [self.group.get(j) for j in self._before(i)]
            residual = node.op_type == "Add" and len(made) == 2
            if (residual and {"attention", "ffn"} & set(made)) or (
                i in norms and i in self.behind
            ):
                self.group.setdefault(i, "normalise")

    def _ends(self) -> None:
        """Before the first layer, and behind the last."""
        tables = [
            i
            for i, node in enumerate(self.nodes)
            if node.op_type in _TABLES
            and i not in self.behind
            and i not in self.group
            and len(getattr(self.constants.get(node.input[0]), "dims", ())) == 2
        ]
        rows = self._flood(tables, self._after, lambda i: i in self.behind)
        index = self._flood(tables, self._before)
        for i in {*tables, *(rows - self.behind), *index}:
            self.group.setdefault(i, "embedding")
        layers = [i for i, g in self.group.items() if g in GROUPS[1:4]]
        inside = self._flood(layers, self._before)
        behind = self.heads | self._flood(layers, self._after)
        for i in behind | self._flood(behind, self._before):
            if i not in inside:
                self.group.setdefault(i, "pooling")

    def _adopt(self) -> None:
        """Give what is cheap to the first that reads it."""
        for i in reversed(range(len(self.nodes))):
            if i not in self.group and self.nodes[i].op_type in _LIGHT:
                first = next(
                    (g for j in sorted(self.readers[i]) if (g := self.group.get(j))),
                    None,
                )
                if first is not None:
                    self.group[i] = first
