"""What a configuration will cost, before it is made: time and bytes.

A configuration's time is that of the dense model in the same precision, less its weighted products, plus those
that it has instead. Both come from measurements on this machine: products of exactly these shapes, alone, in
the target's runtime (`edgelm.evaluate.ceiling`), kept in the user's cache by machine; and the dense model as a
whole. Where the target is another machine nothing is measured: the cost is then the bytes of weights that a
text needs read, as a share of the dense float32 model's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edgelm import layers, widths
from edgelm.archive import cache_folder
from edgelm.bundle import GRAPH, Bundle
from edgelm.evaluate.ceiling import gemm_ceilings
from edgelm.evaluate.recording import open_recorder
from edgelm.export.rounded import open_here
from edgelm.models import LoadedModel
from edgelm.runtimes.engine import cores
from edgelm.runtimes.openvino import OpenVinoSession
from edgelm.runtimes.session import Session
from edgelm.runtimes.workers import cpu_name
from edgelm.targets import Target
from edgelm.tuning.space import Configuration

# Neurons go in steps of so many, as `edgelm.compress.Shrink` has it.
_GRAIN = 16
# Of these calls the fastest counts.
_CALLS = 20


@dataclass(frozen=True)
class Layer:
    """Weighted products of one shape in the dense model.

    Attributes:
        part: ``heads`` or ``neurons``: what it has fewer of when it shrinks.
        reads: Whether these are what it reads, not what it gives.
        inputs: Numbers of a row that it reads.
        outputs: Numbers of a row that it gives.
        units: Heads (of keys and values) or neurons of a block.
        count: How many there are.
        calls: How often a text runs through each.
    """

    part: layers.Part
    reads: bool
    inputs: int
    outputs: int
    units: int
    count: int
    calls: int

    def shape(self, configuration: Configuration) -> tuple[int, int]:
        """Inputs and outputs that are left."""
        neurons = self.part == "neurons"
        keep = configuration.neurons if neurons else configuration.heads
        grain = _GRAIN if neurons else 1
        left = min(max(round(self.units * keep / grain), 1) * grain, self.units)
        if self.reads:
            return self.inputs * left // self.units, self.outputs
        return self.inputs, self.outputs * left // self.units


@dataclass(frozen=True)
class Costs:
    """What a configuration costs.

    Attributes:
        latency: Of one text of median length: ms, or where nothing was measured the bytes of
            weights to read as a share of the dense float32 model's.
        p95: The same for the 95th percentile of the texts.
        size_mb: Its files, MB (10^6 bytes).
    """

    latency: float
    p95: float
    size_mb: float


@dataclass(frozen=True)
class CostModel:
    """All that is needed to predict `Costs`; plain data, so that a journal can keep it.

    Attributes:
        layers: The weighted products.
        rows: Tokens of the median text.
        products: ms of a product, by ``inputs x outputs x kind``; empty where nothing was measured.
        dense_ms: ms of the dense model by precision, by the runtime's own clock.
        tail: 95th percentile of the dense model's time over its median.
        dense_mb: MB of the dense model's bundle by precision and bits of tables.
        groups: Shapes of the products that int8 may leave in float, the most sensitive first.
    """

    layers: tuple[Layer, ...]
    rows: int
    products: Mapping[str, float]
    dense_ms: Mapping[str, float]
    tail: float
    dense_mb: Mapping[str, float]
    groups: tuple[tuple[tuple[int, int], ...], ...] = field(default=())

    def predict(self, configuration: Configuration) -> Costs:
        """What a configuration will cost."""
        c, dense = configuration, configuration.dense
        if self.products:
            measured = replace(dense, floats=0)  # what dense_ms is of
            latency = self.dense_ms[c.precision] + self._time(c) - self._time(measured)
        else:
            latency = self._read(c) / self._read(Configuration(precision="fp32"))
        removed = self._weights(dense) - self._weights(c)
        freed = removed * c.weight_bits / 8 - 3 * sum(
            i * o for i, o, _ in self._floats(c)
        )
        size = self.dense_mb[f"{c.precision}/{c.table_bits}"] - freed / 1e6
        return Costs(latency, latency * self.tail, size)

    def _time(self, c: Configuration) -> float:
        whole = "int" if c.precision == "int8" else "float"
        time = sum(
            layer.count * layer.calls * self.products[key(*layer.shape(c), whole)]
            for layer in self.layers
        )
        for inputs, outputs, calls in self._floats(c):
            more = self.products[key(inputs, outputs, "float")]
            time += calls * (more - self.products[key(inputs, outputs, "int")])
        return time

    def _read(self, c: Configuration) -> float:
        bits = float(c.weight_bits)
        if c.sparsity != "none":
            bits = bits / 2 + 1  # half the values, and two bits to say which
        read = sum(
            layer.count * layer.calls * bits * i * o
            for layer in self.layers
            for i, o in [layer.shape(c)]
        )
        return read + sum(24 * calls * i * o for i, o, calls in self._floats(c))

    def _weights(self, c: Configuration) -> int:
        return sum(
            layer.count * i * o for layer in self.layers for i, o in [layer.shape(c)]
        )

    def _floats(self, c: Configuration) -> list[tuple[int, int, int]]:
        """Shapes and calls of the products that stay in float."""
        found = []
        for shape in (shape for group in self.groups[: c.floats] for shape in group):
            layer = next(
                x for x in self.layers if (x.inputs, x.outputs) == tuple(shape)
            )
            found.append((*layer.shape(c), layer.calls))
        return found


def key(inputs: int, outputs: int, kind: str) -> str:
    """How a product is named in the table."""
    return f"{inputs}x{outputs}x{kind}"


def find_layers(loaded: LoadedModel) -> tuple[Layer, ...]:
    """The weighted products of a model's blocks, by shape."""
    config = loaded.model.config
    where = layers.of_config(config)
    blocks = [block for _, block in layers.blocks(loaded.model)]
    calls = max(int(config.num_hidden_layers) // len(blocks), 1)
    counts: Counter[Layer] = Counter()
    for block in blocks:
        for name in where.linears:
            outputs, inputs = layers.weight_matrix(block.get_submodule(name)).shape
            ffn = name in (*where.ffn_in, where.ffn_out)
            part: layers.Part = "neurons" if ffn else "heads"
            reads = name in (where.attention_out, where.ffn_out)
            units = widths.of_block(config, block, part)
            counts[Layer(part, reads, inputs, outputs, units, 0, calls)] += 1
    return tuple(replace(layer, count=n) for layer, n in counts.items())


def runs_here(target: Target) -> bool:
    """Whether this machine is what the target describes, so that measuring means something."""
    return target.runtime in ("onnxruntime", "openvino") and (
        target.arch in ("any", platform.machine())
        and target.provider in ("CPUExecutionProvider", "CPU", "OpenVINO")
    )


def open_graph(target: Target, graph: Path, threads: int | None = None) -> Session:
    """A graph in its target's runtime, or in ONNX Runtime where that does not run here."""
    if target.runtime == "openvino":
        return OpenVinoSession(graph, threads=threads)
    return open_here(graph, threads)


def measure_products(
    bundle: Bundle, shapes: Iterable[tuple[int, int]], rows: int, runtime: str
) -> dict[str, float]:
    """Ms of products of these shapes on this machine, in integers and in float.

    What was measured before is read from the user's cache, by machine and runtime.
    """
    path = _table_path(runtime)
    known = _read_table(path)
    names = {shape: f"{rows}:{shape[0]}x{shape[1]}" for shape in shapes}
    missing = [s for s, name in names.items() if f"{name}xint" not in known]
    if missing:
        for product, gops in gemm_ceilings(bundle, missing, rows, None).items():
            kind = "int" if product.whole else "float"
            ms = 2 * rows * product.inputs * product.outputs / gops / 1e6
            known[f"{rows}:{key(product.inputs, product.outputs, kind)}"] = ms
        _write_table(path, known)
    return {
        key(*shape, kind): known[f"{name}x{kind}"]
        for shape, name in names.items()
        for kind in ("int", "float")
    }


def measure_dense(
    bundle: Bundle, graph: Path, feed: Mapping[str, Any], name: str, runtime: str
) -> float:
    """Ms of one inference of a graph, by the runtime's own clock: each operator's fastest call.

    What was measured before is read from the user's cache.

    Args:
        bundle: In whose runtime and settings.
        graph: The graph.
        feed: Its inputs.
        name: What the cache calls it.
        runtime: As for `measure_products`.
    """
    path = _table_path(runtime)
    known = _read_table(path)
    if name not in known:
        with tempfile.TemporaryDirectory() as work:
            session = open_recorder(bundle, graph, Path(work), None)
            for _ in range(_CALLS):
                session.run(feed)
            calls = session.finish().calls
        operators = {operator for call in calls for operator in call}
        known[name] = sum(min(call.get(o, 0.0) for call in calls) for o in operators)
        _write_table(path, known)
    return known[name]


def _table_path(runtime: str) -> Path:
    machine = json.dumps([cpu_name(), cores(), runtime])
    digest = hashlib.sha256(machine.encode()).hexdigest()
    return cache_folder() / "tuning" / f"{digest}.json"


def _read_table(path: Path) -> dict[str, float]:
    """A table; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {str(k): float(v) for k, v in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write_table(path: Path, table: Mapping[str, float]) -> None:
    """Keep a table where that is possible."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as work:
            whole = Path(work) / GRAPH
            whole.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
            os.replace(whole, path)
