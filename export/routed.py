"""Routed experts in ONNX Runtime: its MoE operator, kept only where it beats a static network.

The operator's GELU is the approximation by tanh, whatever the model's is. With the same one in PyTorch the two
agree to more than 80 dB (the tests check it). With the exact one a few tokens whose experts are nearly a
draw get others, each of which is an error of a whole expert: `TOLERANCE_DB` is that of such graphs.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm import layers
from edgelm.bundle import GRAPH
from edgelm.errors import ExportError, GateError, TargetError
from edgelm.export.audit import wanted_precisions, write
from edgelm.export.editor import Editor, layer
from edgelm.export.graph import random_inputs
from edgelm.export.modules import interface
from edgelm.export.moe import moe
from edgelm.manifest import Graph
from edgelm.models import LoadedModel
from edgelm.runtimes.session import OnnxSession
from edgelm.targets import Target

# The least agreement with PyTorch, dB.
TOLERANCE_DB = 20.0
# Tokens of the one text that graphs are timed with.
LENGTHS = (16, 64, 256)
_ROUNDS, _WARM_UP = 30, 5
_ACTIVATIONS = {"Gelu": "gelu", "Relu": "relu"}

# Graphs by name and their model to the median milliseconds of each, by the number of tokens.
Times = Mapping[str, Mapping[int, float]]
Timing = Callable[[Mapping[str, Path], LoadedModel], Times]


@dataclass(frozen=True)
class Network:
    """A feed-forward network of a graph.

    Attributes:
        block: The block's name in the model.
        nodes: From the first product to the second.
        bias: Name of the constant between them; empty for none.
        activation: As the operator calls it.
    """

    block: str
    nodes: Sequence[Any]
    bias: str
    activation: str


def check_routed(loaded: LoadedModel, target: Target, precision: str) -> None:
    """Refuse what routed experts cannot be exported for.

    Raises:
        TargetError: There is no operator for them, or it cannot be timed here.
    """
    if loaded.routing is None:
        return
    if precision != "fp32" or target.provider != "CPUExecutionProvider":
        raise TargetError(
            f"Routed experts are exported in fp32 and for ONNX Runtime on a CPU; {target.name} in {precision} was "
            f"asked for. Use --target cpu --precision fp32, or a static model: {_static(loaded)}."
        )
    if target.arch not in ("any", platform.machine()):
        raise TargetError(
            f"Routed experts are exported only where they are measured to be faster, and this is no {target.arch} "
            "machine. Export there."
        )


def write_routed(
    loaded: LoadedModel, source: Path, folder: Path, timing: Timing | None = None
) -> tuple[Graph, dict[str, Any]]:
    """Write a graph with routed experts, where it is faster than a static one and no worse.

    Args:
        loaded: A model with routed experts.
        source: The float32 graph of all experts for all tokens.
        folder: Where the graph goes.
        timing: What measures graphs; `in_turns` if not given.

    Returns:
        The graph's interface, and for the manifest the p50 of the routed, the static and the
        dense graph in milliseconds, by the number of tokens, and what the first two lose.

    Raises:
        ExportError: A network is not one that the operator computes.
        GateError: The routed graph is not faster, or worse.
    """
    assert loaded.routing is not None
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".static.") as work:
        graph = write_experts(loaded, source, folder / GRAPH)
        narrow = Path(work) / GRAPH
        write_narrow(loaded, source, narrow)
        graphs = {"routed": folder / GRAPH, "static": narrow, "dense": source}
        times = (timing or in_turns)(graphs, loaded)
    errors = loaded.routing.errors
    if why := refusal(times, errors):
        raise GateError(
            f"The routed model {loaded.name} is not exported: {why}. "
            f"Use the static one: {_static(loaded)}."
        )
    p50 = {
        way: {str(n): round(ms, 4) for n, ms in found.items()}
        for way, found in times.items()
    }
    return graph, {"routing": {"p50_ms": p50, "errors": dict(errors)}}


def refusal(times: Times, errors: Mapping[str, float]) -> str:
    """Why a routed graph is not kept; empty where it is.

    Args:
        times: Of ``routed``, ``static`` and ``dense``, as `Timing` gives them.
        errors: Of ``routed`` and ``static``, as `edgelm.experts.Routing` has them.

    Returns:
        A clause with all the numbers, unless the routed graph's p50 is below the static one's at every
        length and its error is no larger.
    """
    routed, static = times["routed"], times["static"]
    slower = [n for n in routed if not routed[n] < static[n]]
    worse = not errors["routed"] <= errors["static"]
    if not slower and not worse:
        return ""
    what = " and ".join(
        (["is not faster than a static one of the same active width"] if slower else [])
        + (["is further from the dense one"] if worse else [])
    )
    numbers = "; ".join(
        f"{n} tokens: {routed[n]:.3g} ms routed, {static[n]:.3g} ms static, {times['dense'][n]:.3g} ms dense"
        for n in routed
    )
    return (
        f"it {what} (p50 of {numbers}; variance of the last hidden states that is lost on held-out text: "
        f"{100 * errors['routed']:.3g} % routed, {100 * errors['static']:.3g} % static)"
    )


def in_turns(graphs: Mapping[str, Path], loaded: LoadedModel) -> Times:
    """Median milliseconds of graphs that take turns in this process: one text, all cores."""
    names = [tensor.name for tensor in interface(loaded).inputs]
    vocabulary = int(loaded.model.config.vocab_size)
    opened = {
        way: OnnxSession(path, "CPUExecutionProvider") for way, path in graphs.items()
    }
    times: dict[str, dict[int, float]] = {way: {} for way in graphs}
    for length in sorted({min(n, loaded.max_length) for n in LENGTHS}):
        feeds = random_inputs(names, 1, length, vocabulary)
        seen: dict[str, list[float]] = {way: [] for way in graphs}
        for turn in range(_WARM_UP + _ROUNDS):
            for way, session in opened.items():
                began = time.perf_counter()
                session.run(feeds)
                if turn >= _WARM_UP:
                    seen[way].append(1e3 * (time.perf_counter() - began))
        for way, found in seen.items():
            times[way][length] = statistics.median(found)
    return times


def write_experts(loaded: LoadedModel, source: Path, path: Path) -> Graph:
    """Write a graph whose feed-forward networks are the MoE operator behind their routers.

    Raises:
        ExportError: As for `write_routed`.
    """
    assert loaded.routing is not None
    editor = Editor(source)
    found = networks(loaded, editor)
    wanted = wanted_precisions(editor, "fp32")
    for network in found:
        router = loaded.routing.networks[network.block].router
        entry, out = network.nodes[0], network.nodes[-1]
        w1, w2 = (editor.constants[node.input[1]] for node in (entry, out))
        b1 = editor.constants.get(network.bias, np.zeros(w1.shape[1], np.float32))
        nodes, constants = moe(
            entry.input[0],
            out.output[0],
            (w1.T, b1, w2.T),
            (router.weight.detach().numpy().T, router.bias.detach().numpy()),
            loaded.routing.active,
            scale=loaded.routing.experts,
            activation=network.activation,
        )
        editor.constants |= constants
        editor.follow(entry.input[0], *nodes[:-1])
        editor.replace(out, nodes[-1])
        editor.drop(*network.nodes[:-1])
        del wanted[entry.name]  # in the operator now
    editor.use_vendor()
    return write(editor.finish(), path, wanted)


def write_narrow(loaded: LoadedModel, source: Path, path: Path) -> None:
    """Write the graph of the first neurons, as many as are active: as fast as any static one."""
    assert loaded.routing is not None
    editor = Editor(source)
    for network in networks(loaded, editor):
        entry, out = network.nodes[0], network.nodes[-1]
        width = editor.constants[out.input[1]].shape[0]
        keep = width * loaded.routing.active // loaded.routing.experts
        first: dict[str, NDArray[Any]] = {
            entry.input[1]: editor.constants[entry.input[1]][:, :keep],
            out.input[1]: editor.constants[out.input[1]][:keep],
        }
        if network.bias:
            first[network.bias] = editor.constants[network.bias][:keep]
        for node in network.nodes:
            for i, name in enumerate(node.input):
                if name in first:
                    node.input[i] = editor.constant(f"{name}.narrow", first[name])
    write(editor.finish(), path, {})


def networks(loaded: LoadedModel, editor: Editor) -> list[Network]:
    """The feed-forward networks of a graph; one for each call of a block.

    Raises:
        ExportError: One is not a layer, GELU or ReLU, and another layer.
    """
    where = layers.of_config(loaded.model.config)
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in editor.graph.node:
        for name in node.input:
            readers[name].append(node)
    found = []
    for path, _ in layers.blocks(loaded.model):
        starts = [
            n
            for n in editor.graph.node
            if n.op_type == "MatMul" and layer(n) == f"{path}.{where.ffn_in[0]}"
        ]
        calls = [_follow(editor, readers, path, start) for start in starts]
        if not starts or None in calls or len(where.ffn_in) > 1 or where.fused_gate:
            raise ExportError(
                f"The feed-forward network of {path} is not a layer, GELU or ReLU, and another layer, as ONNX "
                f"Runtime's MoE operator needs it. Use a static model: {_static(loaded)}."
            )
        found += [call for call in calls if call is not None]
    return found


def _follow(
    editor: Editor, readers: Mapping[str, Sequence[Any]], path: str, start: Any
) -> Network | None:
    """The network that begins with a product: product, bias, activation, product."""
    nodes, bias, activation = [start], "", ""
    while len(behind := readers[nodes[-1].output[0]]) == 1:
        node = behind[0]
        nodes.append(node)
        constants = [name for name in node.input if name in editor.constants]
        if (
            node.op_type == "MatMul"
            and activation
            and list(node.input[1:]) == constants
        ):
            return Network(path, nodes, bias, activation)
        if node.op_type == "Add" and constants and not (bias or activation):
            bias = constants[0]
        elif node.op_type in _ACTIVATIONS and not activation:
            activation = _ACTIVATIONS[node.op_type]
        else:
            break
    return None


def _static(loaded: LoadedModel) -> str:
    """The command that makes a static model of the same active width."""
    assert loaded.routing is not None
    share = loaded.routing.active / loaded.routing.experts
    return f"edgelm compress MODEL -o CKPT --ffn-keep {share:g}"
