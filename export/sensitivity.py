"""What each layer's int8 costs in quality, and which layers are therefore left in float.

Products that read the same tensor (query, key and value; gate and up) are a group: they share one
quantised input, so that one of them alone in float would save nothing.

What is measured is the drop against the float32 graph, on texts that nothing else has seen:

- embeddings: 1 - mean cosine of the vectors;
- NER: of the tokens to which either graph gives a label other than ``O``, the share whose labels differ;
- scores, one label: 1 - Spearman's rank correlation; several: the mean absolute change of a score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import GateError, InputError, require
from edgelm.export.editor import layer
from edgelm.export.graph import weighted_products
from edgelm.manifest import EmbeddingInfo, NerInfo, ScoringInfo
from edgelm.metrics import cosine
from edgelm.runtimes.scoring import activate

if TYPE_CHECKING:
    import onnx

Info = EmbeddingInfo | NerInfo | ScoringInfo
Outputs = Sequence[NDArray[np.float32]]


@dataclass(frozen=True)
class Group:
    """Products that read one tensor.

    Attributes:
        nodes: Names of their nodes.
        layers: The modules they come from.
        weights: How many weights, which is also how many multiplications a token takes.
    """

    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class Choice:
    """What became of a group.

    Attributes:
        layers: Its modules.
        weights: How many weights.
        drop: What quantising this group alone, and the tables, costs beyond the tables.
        precision: ``fp32`` or that of the graph.
    """

    layers: tuple[str, ...]
    weights: int
    drop: float
    precision: str


@dataclass(frozen=True)
class Plan:
    """Which groups stay in float.

    Attributes:
        keep: Names of the products that stay in float.
        predicted: Drop of the graph if those of its groups add up.
        least: Drop with every product in float: what the tables cost.
        choices: What became of each group, in the graph's order.
    """

    keep: frozenset[str]
    predicted: float
    least: float
    choices: tuple[Choice, ...]


def groups(proto: onnx.ModelProto) -> list[Group]:
    """The weighted products of a float32 graph that may be quantised, by what they read."""
    sizes = {t.name: int(np.prod(t.dims)) for t in proto.graph.initializer}
    readers: dict[str, list[Any]] = defaultdict(list)
    for product in weighted_products(proto)[0]:
        readers[product.input[0]].append(product)
    return [
        Group(
            tuple(p.name for p in products),
            tuple(layer(p) for p in products),
            sum(sizes[p.input[1]] for p in products),
        )
        for products in readers.values()
    ]


def choose(
    found: Sequence[Group],
    measure: Callable[[Collection[str]], float],
    max_drop: float,
    precision: str = "int8",
) -> Plan:
    """Leave in float what costs most quality for its size, and no more than is needed.

    Each group is quantised alone and measured. They go back to float in the order of their drop
    for a weight; how many must is found by bisection over graphs that are really measured, and of
    these, largest first, every one is quantised again that proves not to be needed. For n groups
    that takes n + log2(n) measurements, and one for each group in float.

    Args:
        found: The groups.
        measure: Gives the drop of the graph whose products of these names stay in float.
        max_drop: The largest drop that will do.
        precision: Of what does not stay in float.

    Raises:
        GateError: Even with every product in float the drop is larger.
    """
    every = frozenset(name for group in found for name in group.nodes)
    least = measure(every)
    if not least <= max_drop:
        raise GateError(
            f"With every matrix product in float and only tables in {precision} the drop is {least:.2g}; "
            f"--max-drop allows {max_drop:.2g}. Allow more, or export with --precision fp32."
        )
    drops, order = rank(found, measure, least)

    def names(kept: Collection[int]) -> frozenset[str]:
        return frozenset(name for i in kept for name in found[i].nodes)

    # The first `high` of the order in float are known to do, the first `low` - 1 not.
    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if measure(names(order[:middle])) <= max_drop:
            high = middle
        else:
            low = middle + 1
    kept = set(order[:high])
    for i in sorted(kept, key=lambda i: -found[i].weights):
        if measure(names(kept - {i})) <= max_drop:
            kept.remove(i)
    predicted = least + sum(d for i, d in enumerate(drops) if i not in kept)
    choices = tuple(
        Choice(g.layers, g.weights, drops[i], "fp32" if i in kept else precision)
        for i, g in enumerate(found)
    )
    return Plan(names(kept), predicted, least, choices)


def rank(
    found: Sequence[Group], measure: Callable[[Collection[str]], float], least: float
) -> tuple[list[float], list[int]]:
    """What quantising each group alone costs, and the groups by that for a weight, dearest first.

    Args:
        found: The groups.
        measure: As for `choose`.
        least: What the tables alone cost.
    """
    every = frozenset(name for group in found for name in group.nodes)
    drops = [max(0.0, measure(every - set(group.nodes)) - least) for group in found]
    order = sorted(range(len(found)), key=lambda i: -drops[i] / found[i].weights)
    return drops, order


def measure_name(info: Info) -> str:
    """What `drop` is for a task, in words."""
    if isinstance(info, EmbeddingInfo):
        return "1 - mean cosine"
    if isinstance(info, NerInfo):
        return "share of changed labels among tokens labelled other than O"
    if len(info.labels) == 1:
        return "1 - Spearman"
    return "mean absolute change of a score"


def drop(info: Info, due: Outputs, found: Outputs) -> float:
    """How far a graph's answers are from the float32 graph's; 0 where they agree.

    Args:
        info: What the model is for.
        due: Of the float32 graph: float32 ``[rows, dimension]``, logits ``[rows, labels]``, or
            for NER ``[rows, tokens, labels]`` without padding.
        found: Of the other graph, in the same batches.

    Raises:
        InputError: The texts give nothing to judge by.
        GateError: A number is not finite.
    """
    if not all(np.isfinite(output).all() for output in found):
        raise GateError("The quantised graph gives numbers that are not finite.")
    if isinstance(info, EmbeddingInfo):
        return 1.0 - float(cosine(np.concatenate(due), np.concatenate(found)).mean())
    if isinstance(info, NerInfo):
        return _changed_labels(info, due, found)
    if len(info.labels) == 1:
        rows = np.concatenate(due).ravel()
        if len(rows) < 3 or np.ptp(rows) == 0:
            raise InputError(
                "The calibration text gives fewer than three different scores; take more of it."
            )
        given = np.concatenate(found).ravel()
        if np.ptp(given) == 0:
            raise GateError("The quantised graph gives every text the same score.")
        stats = require("scipy.stats", "compress")
        return 1.0 - float(stats.spearmanr(rows, given)[0])
    scores = [activate(np.concatenate(x), info.activation) for x in (due, found)]
    return float(np.abs(scores[0] - scores[1]).mean())


def _changed_labels(info: NerInfo, due: Outputs, found: Outputs) -> float:
    outside = info.labels.index("O") if "O" in info.labels else -1
    before, after = (
        np.concatenate([x.argmax(-1).ravel() for x in outputs])
        for outputs in (due, found)
    )
    entity = (before != outside) | (after != outside)
    if not entity.any():
        raise InputError(
            "The model finds no entities in the calibration text, so nothing can be judged by it. "
            "Give text of your own with --calibration FILE."
        )
    return float((before != after)[entity].mean())
