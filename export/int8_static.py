"""Static int8: ranges from calibration text, outlier channels equalised first.

Everything is symmetric with a zero point of zero, and stands in the graph as plain QuantizeLinear and
DequantizeLinear: OpenVINO, TensorRT and ONNX Runtime read the same file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import ExportError, require
from edgelm.export.audit import wanted_precisions, write
from edgelm.export.editor import LARGEST, Editor, tables
from edgelm.export.graph import weighted_products
from edgelm.export.rounding import LEVELS, quantise_weights, rounded
from edgelm.manifest import Graph

if TYPE_CHECKING:
    import onnx

Feeds = Mapping[str, NDArray[Any]]

# Tokens of a tensor that ranges are chosen by.
SAMPLE = 8192
# How much of a channel's range is moved into the weights (SmoothQuant's alpha).
MIGRATIONS = (None, 0.5, 0.7, 0.8, 0.9)
# Where to cut, as a share of the largest value: what lies beyond saturates.
_CUTS = np.linspace(0.3, 1.0, 15)


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
        lost = expected - rounded(held / channel, scale) @ (levels * steps)
        error = float(np.square(lost).sum()) / energy
        if best is None or error < best.error:
            best = Scaling(migration, channel, scale, error)
    assert best is not None
    return best


def _clip(x: NDArray[np.float32], weight: NDArray[np.float32]) -> float:
    """The step with the least squared error, each channel counting by its weight."""
    largest = float(np.abs(x).max()) or 1.0
    some = x[:: max(1, len(x) // 1024)]
    errors = [
        float(np.square(rounded(some, largest * cut / LEVELS) - some).sum(0) @ weight)
        for cut in _CUTS
    ]
    return largest * float(_CUTS[int(np.argmin(errors))]) / LEVELS


def observe(source: Path, feeds: Iterable[Feeds]) -> dict[str, Scaling]:
    """How each input of weighted products shall become int8, by name of the tensor.

    Args:
        source: A float32 graph.
        feeds: Calibration batches, without padding.

    Raises:
        ExportError: A weight, or what calibration gave, is not finite.
    """
    editor = Editor(source)
    readers = _readers(editor.proto)
    samples = _sample(editor.proto, list(readers), feeds)
    found = {}
    for name, x in samples.items():
        if not np.isfinite(x).all():
            raise ExportError(
                f"On calibration text the tensor {name} is not finite: the model overflows. Export it in float32."
            )
        weights = [editor.constants[p.input[1]] for p in readers[name]]
        found[name] = choose_scaling(x, np.concatenate(weights, 1))
    return found


def quantize_static(
    source: Path,
    path: Path,
    scalings: Mapping[str, Scaling],
    keep: Collection[str] = (),
    half_tables: bool = False,
) -> Graph:
    """Write a graph whose weighted matrix products are int8, and the embedding tables too.

    Args:
        source: A float32 graph.
        path: The file to write.
        scalings: What `observe` found.
        keep: Names of products that stay float32.
        half_tables: Store tables in float16 instead: TensorRT reads no rows of int8.

    Returns:
        The new graph's interface.

    Raises:
        ExportError: The graph is not what was asked for.
    """
    editor = Editor(source)
    fits = half_tables and _tables_fit_half(editor)
    stored = None if not half_tables else "fp16" if fits else "fp32"
    wanted = wanted_precisions(editor, "int8", keep, stored)
    for name, products in _readers(editor.proto).items():
        chosen = [product for product in products if product.name not in keep]
        if chosen:
            _quantise(editor, name, chosen, scalings[name])
    if fits:
        editor.halve_tables()
    elif not half_tables:
        editor.quantise_tables()
    return write(editor.finish(), path, wanted)


def _tables_fit_half(editor: Editor) -> bool:
    rows = tables(editor.proto, editor.constants)
    return all(np.abs(editor.constants[g.input[0]]).max() <= LARGEST for g in rows)


def _readers(proto: onnx.ModelProto) -> dict[str, list[Any]]:
    readers = defaultdict(list)
    for product in weighted_products(proto)[0]:
        readers[product.input[0]].append(product)
    return readers


def _quantise(editor: Editor, name: str, products: list[Any], scaling: Scaling) -> None:
    """Int8 for an input and for the weights of the products that read it."""
    x, nodes = name, []
    if scaling.migration is not None:
        factor = editor.constant(f"{name}.factor", 1 / scaling.channel)
        nodes.append(editor.node("Mul", [x, factor], f"{name}.scaled"))
        x = f"{name}.scaled"
    step = editor.constant(f"{name}.step", np.array(scaling.scale, np.float32))
    zero = editor.constant(f"{name}.zero", np.array(0, np.int8))
    levels = f"{name}.int8"
    nodes += [
        editor.node("QuantizeLinear", [x, step, zero], levels),
        editor.node("DequantizeLinear", [levels, step, zero], f"{name}.quantised"),
    ]
    editor.follow(name, *nodes)
    for product in products:
        weights = editor.constants[product.input[1]] * scaling.channel[:, None]
        new, (whole, steps) = f"{product.name}.weight", quantise_weights(weights)
        inputs = [
            editor.constant(f"{new}.int8", whole),
            editor.constant(f"{new}.step", steps),
            editor.constant(f"{new}.zero", np.zeros(len(steps), np.int8)),
        ]
        editor.follow("", editor.node("DequantizeLinear", inputs, new, axis=1))
        product.input[0], product.input[1] = f"{name}.quantised", new


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
            flat = value.reshape(-1, value.shape[-1])
            if len(flat) == count:
                rows[name].append(flat[kept])
            else:  # rows of relative positions, the same for every text
                rows[name] = [flat[:SAMPLE]]
    return {name: np.concatenate(parts) for name, parts in rows.items()}
