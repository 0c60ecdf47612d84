"""Sessions that record how long each operator takes, as their runtimes themselves tell."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from edgelm.bundle import Bundle
from edgelm.errors import SessionError, require
from edgelm.evaluate.operators import GROUPS, OTHER, Operators, Product, find_groups
from edgelm.runtimes.engine import chosen_provider
from edgelm.runtimes.openvino import PROVIDER, OpenVinoSession
from edgelm.runtimes.session import Arrays, OnnxSession, Session

# Of what one fused operator was made, the first of these names it.
_FIRST = ("attention", "ffn", "pooling", "embedding", "normalise", "quantise")
assert set(_FIRST) == set(GROUPS)


@dataclass(frozen=True)
class Recording:
    """What a session's operators were, and how long they took.

    Attributes:
        calls: For each call of `run`, the ms of each operator.
        operators: What they are for, by the runtime's names.
        origins: The nodes of the graph that each was made of, where that is known.
    """

    calls: tuple[Mapping[str, float], ...]
    operators: Operators
    origins: Mapping[str, tuple[str, ...]]


class Recorder(Session, Protocol):
    """A session that records."""

    def finish(self) -> Recording:
        """End recording and give what was recorded."""
        ...


def open_recorder(
    bundle: Bundle, graph: Path, work: Path, threads: int | None
) -> Recorder:
    """Open a graph in a bundle's runtime and settings, with one worker.

    Args:
        bundle: The bundle.
        graph: Its graph, or any other.
        work: An empty folder for the runtime's own files.
        threads: As for `edgelm.load`.
    """
    provider = chosen_provider(bundle, None)
    exact = bundle.manifest.precision == "fp32"
    if provider == PROVIDER:
        return _OpenVinoRecorder(graph, threads=threads, exact=exact)
    return _OnnxRecorder(graph, provider, threads, work, exact=exact)


class _OnnxRecorder(OnnxSession):
    """ONNX Runtime's own profile, read against the graph that its optimiser made."""

    def __init__(
        self,
        graph: Path,
        provider: str,
        threads: int | None,
        work: Path,
        *,
        exact: bool,
    ) -> None:
        self._optimised = work / "optimised.onnx"
        super().__init__(graph, provider, threads, exact=exact)

    def _options(self, ort: Any, threads: int | None) -> Any:
        options = super()._options(ort, threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(self._optimised.with_name("profile"))
        options.optimized_model_filepath = str(self._optimised)
        return options

    def finish(self) -> Recording:
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_text(encoding="utf-8"))
        calls: list[dict[str, float]] = []
        call: dict[str, float] = {}
        for event in events:
            name = event["name"]
            if event["cat"] == "Node" and name.endswith("_kernel_time"):
                name = name.removesuffix("_kernel_time")
                call[name] = call.get(name, 0.0) + event["dur"] / 1e3
            elif name == "model_run":
                calls.append(call)
                call = {}
        onnx = require("onnx", "export")
        operators = find_groups(onnx.load(self._optimised, load_external_data=False))
        return Recording(
            tuple(calls), operators, {name: (name,) for name in operators.groups}
        )


class _OpenVinoRecorder(OpenVinoSession):
    """OpenVINO's own profile; its operators name the nodes that they were made of."""

    def __init__(self, graph: Path, *, threads: int | None, exact: bool) -> None:
        super().__init__(graph, threads=threads, exact=exact)
        self._graph = graph
        self._calls: list[dict[str, float]] = []
        self._before: dict[str, float] = {}

    def _settings(
        self, threads: int | None, workers: int, exact: bool
    ) -> dict[str, Any]:
        return {**super()._settings(threads, workers, exact), "PERF_COUNT": True}

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Run the graph once, and keep what each operator took."""
        outputs = super().run(feeds)
        request = self._requests.get()
        count = len(self._calls) + 1
        total: dict[str, float] = defaultdict(float)
        for entry in request.get_profiling_info():
            if entry.status != entry.status.EXECUTED:
                continue
            # OpenVINO tells the mean of all calls so far, in whole microseconds.
            total[entry.node_name] += count * entry.real_time.total_seconds() * 1e3
        self._requests.put(request)
        self._calls.append(
            {name: ms - self._before.get(name, 0.0) for name, ms in total.items()}
        )
        self._before = total
        return outputs

    def finish(self) -> Recording:
        onnx = require("onnx", "export")
        proto = onnx.load(self._graph, load_external_data=False)
        graph = find_groups(proto)
        # What gives an output is named by that.
        makers = {name: n.name for n in proto.graph.node for name in n.output}
        last = {o.name: makers[o.name] for o in proto.graph.output}
        groups: dict[str, str] = {}
        kinds: dict[str, str] = {}
        products: dict[str, tuple[Product, ...]] = {}
        origins: dict[str, tuple[str, ...]] = {}
        for op in reversed(self._model.get_runtime_model().get_ordered_ops()):
            name, about = op.get_friendly_name(), op.get_rt_info()
            kinds[name] = about["layerType"].value
            made_of = about["originalLayersNames"].value.split(",")
            # What it added to a node bears that node's name in front of a slash.
            known = [n for entry in made_of if (n := entry.split("/")[0])]
            origins[name] = tuple(dict.fromkeys(last.get(n, n) for n in known))
            if not set(origins[name]) & set(graph.groups):
                origins[name] = _by_weights(op, graph.weights) or origins[name]
            found = {graph.groups.get(n, OTHER) for n in origins[name]}
            group = next((g for g in _FIRST if g in found), OTHER)
            if group == OTHER and not set(origins[name]) & set(graph.groups):
                group = _reader(op, groups)  # OpenVINO's own: for what it feeds
            groups[name] = group
            inside = [p for n in origins[name] for p in graph.products.get(n, ())]
            if inside:
                products[name] = tuple(inside)
        operators = replace(graph, groups=groups, kinds=kinds, products=products)
        return Recording(tuple(self._calls), operators, origins)


def _by_weights(op: Any, weights: Mapping[str, str]) -> tuple[str, ...]:
    """The node whose weights an operator multiplies; only they tell what was fused and renamed."""
    if op.get_rt_info()["layerType"].value not in ("FullyConnected", "MatMul"):
        return ()
    node = op.input_value(1).get_node()
    while node.get_input_size():
        node = node.input_value(0).get_node()
    name = node.get_friendly_name()
    return (weights[name],) if name in weights else ()


def _reader(op: Any, groups: Mapping[str, str]) -> str:
    """The group of the first that reads an operator and has one."""
    readers = [
        target.get_node().get_friendly_name()
        for output in op.outputs()
        for target in output.get_target_inputs()
    ]
    known = (groups[name] for name in readers if groups.get(name, OTHER) != OTHER)
    return next(known, OTHER)


def check_calls(recording: Recording, due: int) -> None:
    """Refuse a recording that lacks calls: ONNX Runtime stops at a number of events.

    Raises:
        SessionError: It has fewer than were made.
    """
    if len(recording.calls) != due:
        raise SessionError(
            f"The runtime recorded {len(recording.calls)} of {due} calls. Profile fewer texts, with --texts."
        )
