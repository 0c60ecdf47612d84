"""Static int8: ranges from calibration text, outlier channels equalised first.

Everything is symmetric with a zero point of zero, and stands in the graph as plain QuantizeLinear and
DequantizeLinear: OpenVINO, TensorRT and ONNX Runtime read the same file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import Graph
from edgelm.errors import ExportError, require
from edgelm.export.graph import describe, save, weighted_products

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, NDArray[Any]]

# Tokens of a tensor that ranges are chosen by.
SAMPLE = 8192
# How much of a channel's range is moved into the weights (SmoothQuant's alpha).
MIGRATIONS = (None, 0.5, 0.7, 0.8, 0.9)
# Where to cut, as a share of the largest value: what lies beyond saturates.
_CUTS = np.linspace(0.3, 1.0, 15)
_LEVELS = 127.0


@dataclass(frozen=True)
class Scaling:
    """How the input of a matrix product becomes int8: ``round(x / (channel scale))``.

    Attributes:
        migration: SmoothQuant's alpha, or None where channels are left alone.
        channel: float32 ``[channels]``; what each channel is divided by.
        scale: The size of a step, behind the division.
        error: Squared error of the products on held-out rows, relative to their variance.
    """

    migration: float | None
    channel: NDArray[np.float32]
    scale: float
    error: float


def choose_scaling(x: NDArray[np.float32], weights: NDArray[np.float32]) -> Scaling:
    """Choose how to quantise the input of matrix products, by the error of their outputs.

    Part of a channel's range is moved into the weights, which is exact in float (SmoothQuant, Xiao et
    al. 2023, arXiv 2211.10438, eq. 4). Unlike there, how much is chosen for each tensor, on every
    fourth row, which ranges have not seen; and values beyond the range of least error saturate.

    Args:
        x: float32 ``[tokens, channels]``.
        weights: float32 ``[channels, outputs]`` of all products that read it.
    """
    held, fit = x[::4], np.delete(x, np.s_[::4], axis=0) if len(x) > 4 else x
    spread = np.abs(fit).max(0)
    # A channel that was quiet on this text may not be on the next.
    spread = np.maximum(spread, float(np.median(spread)) or 1.0)
    reach = np.maximum(np.abs(weights).max(1), 1e-6)
    expected = held @ weights
    energy = float(np.square(expected - expected.mean(0)).sum()) or 1.0
    best: Scaling | None = None
    for migration in MIGRATIONS:
        channel = np.ones_like(spread)
        if migration is not None:
            channel = spread**migration / reach ** (1 - migration)
        counterpart = weights * channel[:, None]
        scale = _clip(fit / channel, np.square(counterpart).sum(1))
        levels, steps = quantise_weights(counterpart)
        lost = expected - _rounded(held / channel, scale) @ (levels * steps)
        error = float(np.square(lost).sum()) / energy
        if best is None or error < best.error:
            best = Scaling(migration, channel, scale, error)
    assert best is not None
    return best


def quantise_weights(
    weights: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 for each output, at the step of least squared error.

    Args:
        weights: float32 ``[inputs, outputs]``.

    Returns:
        int8 ``[inputs, outputs]`` within -127 and 127, and the steps, float32 ``[outputs]``.
    """
    largest = np.abs(weights).max(0)
    # A column of zeros has any step; this one is a normal number in float16, too.
    largest = np.where(largest > 0, largest, 1.0).astype(np.float32)
    steps, least = largest / _LEVELS, np.full(len(largest), np.inf)
    for cut in np.linspace(0.7, 1.0, 7):
        step = (largest * cut / _LEVELS).astype(np.float32)
        error = np.square(_rounded(weights, step) - weights).sum(0)
        better = error < least
        steps, least = np.where(better, step, steps), np.where(better, error, least)
    levels = np.clip(np.rint(weights / steps), -_LEVELS, _LEVELS)
    return levels.astype(np.int8), steps.astype(np.float32)


def _rounded(x: NDArray[Any], step: Any) -> NDArray[Any]:
    rounded: NDArray[Any] = np.clip(np.rint(x / step), -_LEVELS, _LEVELS) * step
    return rounded


def _clip(x: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    """The step with the least squared error, each channel counting by its weight."""
    largest = float(np.abs(x).max()) or 1.0
    some = x[:: max(1, len(x) // 1024)]
    errors = [
        float(np.square(_rounded(some, largest * cut / _LEVELS) - some).sum(0) @ weight)
        for cut in _CUTS
    ]
    return largest * float(_CUTS[int(np.argmin(errors))]) / _LEVELS


def quantize_static(source: Path, path: Path, feeds: Iterable[Feeds]) -> Graph:
    """Write a graph whose weighted matrix products are int8, and the embedding tables too.

    Args:
        source: A float32 graph.
        path: The file to write.
        feeds: Calibration batches, without padding.

    Returns:
        The new graph's interface.

    Raises:
        ExportError: Calibration gave values that are not finite, or the graph is
            not what was asked for.
    """
    onnx = require("onnx", "export")
    proto = onnx.load(source)
    readers = defaultdict(list)
    for product in weighted_products(proto)[0]:
        readers[product.input[0]].append(product)
    samples = _sample(proto, list(readers), feeds)
    editor = _Editor(proto)
    for name, x in samples.items():
        if not np.isfinite(x).all():
            raise ExportError(
                f"On calibration text the tensor {name} is not finite: the model overflows. Export it in float32."
            )
        weights = [editor.constants[p.input[1]] for p in readers[name]]
        scaling = choose_scaling(x, np.concatenate(weights, 1))
        editor.quantise(name, readers[name], scaling)
    editor.quantise_tables()
    editor.finish()
    save(proto, path)
    onnx.checker.check_model(str(path))
    graph = describe(proto, path.name)
    if graph.operators.get("QuantizeLinear", 0) != len(readers):
        raise ExportError(
            f"Of {len(readers)} inputs of matrix products {graph.operators.get('QuantizeLinear', 0)} became int8."
        )
    return graph


def _sample(
    proto: onnx.ModelProto, names: list[str], feeds: Iterable[Feeds]
) -> dict[str, NDArray[np.float32]]:
    """Rows of tensors of a graph, `SAMPLE` of each, drawn evenly over the batches."""
    if not names:
        return {}
    onnx, ort = require("onnx", "export"), require("onnxruntime", "ort")
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    feeds = list(feeds)
    tokens = sum(int(np.prod(f["input_ids"].shape)) for f in feeds)
    share = min(1.0, SAMPLE / max(tokens, 1))
    draw = np.random.default_rng(0)
    rows: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for feed in feeds:
        count = int(np.prod(feed["input_ids"].shape))
        kept = np.flatnonzero(draw.random(count) < share)
        for name, value in zip(names, session.run(names, dict(feed)), strict=True):
            rows[name].append(value.reshape(count, -1)[kept])
    return {name: np.concatenate(parts) for name, parts in rows.items()}


class _Editor:
    """Changes a graph in place."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.onnx = require("onnx", "export")
        self.graph = proto.graph
        self.constants = {
            t.name: self.onnx.numpy_helper.to_array(t) for t in proto.graph.initializer
        }
        self.added: dict[str, list[Any]] = defaultdict(
            list
        )  # by the tensor they follow

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = value
        return name

    def node(self, kind: str, inputs: list[str], output: str, **settings: Any) -> Any:
        return self.onnx.helper.make_node(
            kind, inputs, [output], name=f"{output}.{kind}", **settings
        )

    def quantise(self, name: str, products: list[Any], scaling: Scaling) -> None:
        """Int8 for an input and for the weights of the products that read it."""
        x, nodes = name, []
        if scaling.migration is not None:
            factor = self.constant(f"{name}.factor", 1 / scaling.channel)
            nodes.append(self.node("Mul", [x, factor], f"{name}.scaled"))
            x = f"{name}.scaled"
        step = self.constant(f"{name}.step", np.array(scaling.scale, np.float32))
        zero = self.constant(f"{name}.zero", np.array(0, np.int8))
        nodes += [
            self.node("QuantizeLinear", [x, step, zero], f"{name}.int8"),
            self.node(
                "DequantizeLinear", [f"{name}.int8", step, zero], f"{name}.quantised"
            ),
        ]
        self.added[name] += nodes
        for product in products:
            self._weights(product, scaling)
            product.input[0] = f"{name}.quantised"

    def _weights(self, product: Any, scaling: Scaling) -> None:
        name = product.input[1]
        weights = self.constants[name]
        levels, steps = quantise_weights(weights * scaling.channel[:, None])
        new = f"{product.name}.weight"
        inputs = [
            self.constant(f"{new}.int8", levels),
            self.constant(f"{new}.step", steps),
            self.constant(f"{new}.zero", np.zeros(len(steps), np.int8)),
        ]
        self.added[""].append(self.node("DequantizeLinear", inputs, new, axis=1))
        product.input[1] = new

    def quantise_tables(self) -> None:
        """Embedding tables that the graph reads by row: int8, each row with a step of its own."""
        for gather in list(self.graph.node):
            if gather.op_type != "Gather" or gather.input[0] not in self.constants:
                continue
            table = self.constants[gather.input[0]]
            if table.ndim != 2 or table.dtype != np.float32 or len(table) < 1024:
                continue
            name, out = gather.input[0], gather.output[0]
            levels, steps = quantise_weights(np.ascontiguousarray(table.T))
            gather.input[0] = self.constant(f"{name}.int8", levels.T.copy())
            gather.output[0] = f"{out}.int8"
            step = self.constant(f"{name}.step", steps[:, None])
            self.added[f"{out}.int8"] += [
                self.node("Cast", [f"{out}.int8"], f"{out}.levels", to=1),
                self.node("Gather", [step, gather.input[1]], f"{out}.step"),
                self.node("Mul", [f"{out}.levels", f"{out}.step"], out),
            ]

    def finish(self) -> None:
        """Put the new nodes where what they read is there, and drop what nothing reads."""
        nodes = list(self.added.pop("", []))
        nodes += [n for i in self.graph.input for n in self.added.pop(i.name, [])]
        for node in self.graph.node:
            nodes.append(node)
            for output in node.output:
                nodes += self.added.pop(output, [])
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
        del self.graph.value_info[:]
