"""A float32 graph in the precision that was asked for, judged on text that chose nothing."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgelm import schema
from edgelm.bundle import GRAPH
from edgelm.calibration import Calibration, load_texts, split
from edgelm.errors import ConfigError, GateError, TargetError, require
from edgelm.export.editor import HALVES
from edgelm.export.graph import read_graph, weighted_products
from edgelm.export.half import write_half
from edgelm.export.int8_dynamic import quantize_dynamic
from edgelm.export.int8_static import Feeds, observe, quantize_static
from edgelm.export.modules import interface
from edgelm.export.rounded import CHECKED, open_here
from edgelm.export.sensitivity import (
    Group,
    Plan,
    choose,
    drop,
    groups,
    measure_name,
    rank,
)
from edgelm.export.weight_only import WeightOnly, quantize_weights
from edgelm.manifest import EmbeddingInfo, Graph, NerInfo, ScoringInfo
from edgelm.models import LoadedModel
from edgelm.pipeline import calibration_batches
from edgelm.runtimes.openvino import OpenVinoSession
from edgelm.runtimes.session import OnnxSession, Session
from edgelm.targets import Target

# The least agreement with the original model, dB. On encoders int8 gives 15 to 25, weights of
# 4 bits 9 to 15; a graph that lost its mask or a layer gives less than 5. Three bits of
# mantissa fewer than float16's cost 18 dB.
TOLERANCE_DB = {
    "fp32": 80.0,
    "fp16": 40.0,
    "bf16": 22.0,
    "int8": 12.0,
    "int8-weights": 20.0,
    "int4-weights": 6.0,
}
PRECISIONS = tuple(TOLERANCE_DB)
# What is written with operators of ONNX Runtime's own.
_VENDOR = ("int8-weights", "int4-weights")


@dataclass(frozen=True)
class Written:
    """A graph, and how it came to be what it is.

    Attributes:
        graph: Its interface.
        about: For the manifest: how the drop is measured, what it is, what was chosen.
    """

    graph: Graph
    about: Mapping[str, Any] = field(default_factory=dict)


def check_precision(target: Target, precision: str, table_bits: int = 8) -> None:
    """Refuse what a target cannot run.

    Raises:
        ConfigError: The precision's tables are not whole numbers.
        TargetError: It does not have the precision, or no tables of so few bits.
    """
    if table_bits == 4 and not precision.startswith("int"):
        raise ConfigError(
            f"--embedding-bits 4 goes with int8, int8-weights and int4-weights, not with {precision}."
        )
    if table_bits == 4 and target.runtime != "onnxruntime":
        raise TargetError(
            f"--embedding-bits 4 needs GatherBlockQuantized, an operator of ONNX Runtime's own that {target.runtime}, "
            f"the runtime of the target {target.name}, does not have. Leave it at 8."
        )
    if precision in target.precisions:
        return
    has = f"The target {target.name} has the precisions {', '.join(target.precisions)}; {precision} was asked for."
    if precision in _VENDOR and target.runtime != "onnxruntime":
        has += f" That needs MatMulNBits, an operator of ONNX Runtime's own that {target.runtime} does not have."
    raise TargetError(has)


def write_graph(
    loaded: LoadedModel,
    target: Target,
    precision: str,
    source: Path,
    folder: Path,
    calibration: Calibration,
    *,
    block: int = 32,
    table_bits: int = 8,
    max_drop: float | None = None,
    search: bool = False,
    keep: Collection[str] = (),
) -> Written:
    """Write a graph in a precision.

    Args:
        loaded: The model.
        target: What it is for.
        precision: One that the target has.
        source: The float32 graph, alone in its folder.
        folder: Where the graph goes.
        calibration: The text that ranges are taken from, and, another part of it, that
            the drop is measured on.
        block: Weights that share a scale, where only weights are quantised.
        table_bits: 8, or 4 for large embedding tables, where products are integers.
        max_drop: The largest drop that will do, as `edgelm.export.sensitivity` defines it.
        search: Whether int8 may leave layers in float to hold ``max_drop``.
        keep: Names of products that int8 leaves in float, where nothing is searched.

    Raises:
        ExportError: The graph is not what was asked for.
        GateError: The drop is larger than ``max_drop``.
    """
    path = folder / GRAPH
    if precision == "fp32":
        shutil.copytree(source.parent, folder, dirs_exist_ok=True)
        return Written(read_graph(path))
    fit, held_out = split(load_texts(calibration))
    judge = _Judge(loaded, target, source, calibration, held_out)
    about: dict[str, Any] = {}
    ranges = feeds(loaded, fit, calibration)
    if precision in HALVES:
        graph, kept = write_half(source, path, ranges, precision)
        about["fp32"] = dict(kept)
        if precision == "bf16":
            about["checked"] = CHECKED
    elif precision in _VENDOR:
        config = WeightOnly(4 if precision == "int4-weights" else 8, block)
        graph = quantize_weights(source, path, config, table_bits)
        about["block"] = block
    else:
        quantise = _int8(target, source, ranges, table_bits)
        plan = _plan(judge, quantise, source, path.parent, max_drop) if search else None
        graph = quantise(path, plan.keep if plan else keep)
        if plan:
            about |= {"predicted": plan.predicted, "tables": plan.least}
            about["layers"] = schema.plain(plan.choices)
        elif keep:
            about["kept"] = sorted(keep)
    if table_bits != 8:
        about["table_bits"] = table_bits
    found = judge.drop(path)
    about |= {"measure": measure_name(judge.info), "drop": found, "max_drop": max_drop}
    if max_drop is not None and not found <= max_drop:
        raise GateError(
            f"The {precision} graph of {loaded.name} has a drop of {found:.2g} ({about['measure']}, "
            f"{len(held_out)} held-out texts); --max-drop allows {max_drop:.2g}. "
            "Allow more, or let --precision auto leave layers in float."
        )
    return Written(graph, about)


def feeds(
    loaded: LoadedModel, texts: Sequence[str], calibration: Calibration
) -> Iterator[Feeds]:
    """Texts as inputs of the graph: a text a batch, so that there is no padding."""
    names = [tensor.name for tensor in interface(loaded).inputs]
    for batch in calibration_batches(loaded, texts, calibration):
        for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
            ids = batch.input_ids[row : row + 1, :length]
            types = batch.token_type_ids
            given = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "token_type_ids": torch.zeros_like(ids)
                if types is None
                else types[row : row + 1, :length],
            }
            yield {name: given[name].numpy() for name in names}


_Quantise = Callable[[Path, Collection[str]], Graph]


def _int8(
    target: Target, source: Path, ranges: Iterator[Feeds], table_bits: int
) -> _Quantise:
    # ONNX Runtime's kernels are fastest with ranges taken at each call; the
    # other runtimes have kernels for static ranges only.
    if target.runtime == "onnxruntime":
        return lambda path, keep: quantize_dynamic(source, path, keep, table_bits)
    scalings = observe(source, ranges)
    half = target.runtime == "tensorrt"
    return lambda path, keep: quantize_static(source, path, scalings, keep, half)


class _Judge:
    """The drop of graphs against the float32 graph's answers, on texts of its own."""

    def __init__(
        self,
        loaded: LoadedModel,
        target: Target,
        source: Path,
        calibration: Calibration,
        texts: Sequence[str],
    ) -> None:
        info = loaded.info
        assert isinstance(info, (EmbeddingInfo, NerInfo, ScoringInfo))
        self.info = info
        self._target = target
        self._feeds = list(feeds(loaded, texts, calibration))
        self._due = self._run(OnnxSession(source, "CPUExecutionProvider"))

    def drop(self, graph: Path) -> float:
        """Of a graph, in the runtime of its target where that runs on CPUs."""
        vino = self._target.runtime == "openvino"
        session = OpenVinoSession(graph) if vino else open_here(graph)
        return drop(self.info, self._due, self._run(session))

    def _run(self, session: Session) -> list[NDArray[np.float32]]:
        return [next(iter(session.run(given).values())) for given in self._feeds]


def _plan(
    judge: _Judge,
    quantise: _Quantise,
    source: Path,
    folder: Path,
    max_drop: float | None,
) -> Plan:
    assert max_drop is not None
    measure = _measure(judge, quantise, folder.parent)
    return choose(_groups(source), measure, max_drop)


Named = tuple[str, tuple[int, int]]


def by_sensitivity(
    loaded: LoadedModel, target: Target, source: Path, calibration: Calibration
) -> list[tuple[Named, ...]]:
    """The products that int8 may leave in float, in groups, the most sensitive first.

    Args:
        loaded: The model.
        target: What it is for.
        source: The float32 graph, alone in its folder.
        calibration: The text, as for `write_graph`.

    Returns:
        Of each product of a group its name, and its inputs and outputs.
    """
    fit, held_out = split(load_texts(calibration))
    judge = _Judge(loaded, target, source, calibration, held_out)
    quantise = _int8(target, source, feeds(loaded, fit, calibration), 8)
    found = _groups(source)
    measure = _measure(judge, quantise, source.parent.parent)
    least = measure([name for group in found for name in group.nodes])
    proto = require("onnx", "export").load(source, load_external_data=False)
    dims = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    shapes = {p.name: dims[p.input[1]] for p in weighted_products(proto)[0]}
    order = rank(found, measure, least)[1]
    return [tuple((name, shapes[name]) for name in found[i].nodes) for i in order]


def _groups(source: Path) -> list[Group]:
    onnx = require("onnx", "export")
    return groups(onnx.load(source, load_external_data=False))


def _measure(
    judge: _Judge, quantise: _Quantise, folder: Path
) -> Callable[[Collection[str]], float]:
    """What a graph costs by what it leaves in float; it is written beside."""

    def measure(keep: Collection[str]) -> float:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".layers.") as work:
            quantise(Path(work) / GRAPH, keep)
            return judge.drop(Path(work) / GRAPH)

    return measure
