"""Whether a routed feed-forward network runs faster than a static one of the width that is active, in ONNX Runtime.

    python benchmarks/routed_execution.py -o routed.json

One network of a model, float32 and 8 bit, every way in turns in one process, for a batch of 1 and of
32 texts of 16, 64 and 256 tokens. The experts are contiguous, the router is random:
only the time counts, and that each graph computes what it should is checked against numpy first.

    dense       all neurons
    static      as many as are active, no router
    MoE         com.microsoft's operator, each token to its experts
    QMoE        the same with 8-bit weights in blocks of 32
    If          each text to its experts (batch of 1): experts that are off do not run
    capacity    each expert takes its share of a text's tokens: plain operators, fixed shapes
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from edgelm import layers
from edgelm.export.moe import choice, moe, stacked
from edgelm.models import load_model

Array = np.ndarray[Any, Any]


class Network:
    """A feed-forward network with GELU, its experts and its router.

    Attributes:
        w1, b1, w2, b2: ``[F, H]``, ``[F]``, ``[H, F]``, ``[H]``.
        router: ``[H, E]``.
        experts, active: N and k.
    """

    def __init__(self, model: str, experts: int, active: int) -> None:
        loaded = load_model(model)
        where = layers.architecture(loaded.architecture)
        block = layers.blocks(loaded.model)[0][1]
        entry, out = (
            block.get_submodule(name) for name in (where.ffn_in[0], where.ffn_out)
        )
        self.w1, self.w2 = (
            layers.weight_matrix(x).detach().numpy() for x in (entry, out)
        )
        self.b1, self.b2 = (x.bias.detach().numpy() for x in (entry, out))
        self.experts, self.active = experts, active
        self.hidden, self.width = self.w1.shape[1], self.w1.shape[0]
        draw = np.random.default_rng(0)
        shape = (self.hidden, experts)
        self.router = draw.standard_normal(shape).astype(np.float32)

    @property
    def size(self) -> int:
        """Neurons of an expert."""
        return self.width // self.experts

    def expert(self, e: int) -> tuple[Array, Array, Array]:
        """``w1 [H, size]``, ``b1``, ``w2 [size, H]`` of an expert, ready to multiply from the right."""
        own = slice(e * self.size, (e + 1) * self.size)
        return self.w1[own].T, self.b1[own], self.w2[:, own].T

    def outputs(self, x: Array) -> Array:
        """What each expert adds, ``[..., E, H]``."""
        parts = [self.expert(e) for e in range(self.experts)]
        return np.stack([gelu(x @ w1 + b1) @ w2 for w1, b1, w2 in parts], axis=-2)

    def top(self, logits: Array) -> Array:
        """Ones at the active experts, over the last axis."""
        order = np.argsort(-logits, axis=-1)[..., : self.active]
        mask = np.zeros_like(logits)
        np.put_along_axis(mask, order, 1.0, axis=-1)
        return mask


def gelu(x: Array) -> Array:
    """The exact one."""
    return (0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))).astype(np.float32)


class Graph:
    """A graph under construction; every method adds a node and gives its output's name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.names = 0

    def constant(self, value: Any) -> str:
        """A constant."""
        self.names += 1
        name = f"c{self.names}"
        self.constants.append(
            numpy_helper.from_array(np.ascontiguousarray(value), name)
        )
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """A node; gives the names of its outputs, or the one name."""
        names = []
        for _ in range(outputs):
            self.names += 1
            names.append(f"t{self.names}")
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names[0] if outputs == 1 else names

    def take(self, nodes: list[Any], constants: dict[str, Array]) -> None:
        """Nodes that were made elsewhere."""
        self.nodes += nodes
        self.constants += [
            numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()
        ]

    def session(self, output: str, hidden: int) -> ort.InferenceSession:
        """Finish it."""
        shape = ["batch", "sequence", hidden]
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.force_spinning_stop", "1")
        text = model.SerializeToString()
        return ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])


def product(g: Graph, x: str, w1: Array, b1: Array, w2: Array) -> str:
    """``gelu(x w1 + b1) w2``."""
    up = g.add("Add", g.add("MatMul", x, g.constant(w1)), g.constant(b1))
    return str(g.add("MatMul", g.add("Gelu", up), g.constant(w2)))


def plain(n: Network, width: int) -> ort.InferenceSession:
    """The first ``width`` neurons."""
    g = Graph()
    y = product(g, "x", n.w1[:width].T, n.b1[:width], n.w2[:, :width].T)
    return g.session(g.add("Add", y, g.constant(n.b2)), n.hidden)


def routed(g: Graph, n: Network) -> tuple[str, Array, Array, Array]:
    """The operators' logits, and weights of all experts that add up to a plain sum."""
    nodes, constants = choice(
        "x", "chosen", (n.router, np.zeros_like(n.router[0])), n.active
    )
    g.take(nodes, constants)
    weights = stacked(n.w1, n.b1, n.w2, experts=n.experts, scale=n.active)
    return "chosen.logits", *weights


def mixture(n: Network) -> ort.InferenceSession:
    """com.microsoft MoE."""
    g = Graph()
    router = n.router, np.zeros_like(n.router[0])
    g.take(*moe("x", "mixed", (n.w1, n.b1, n.w2), router, n.active, scale=n.active))
    return g.session(g.add("Add", "mixed", g.constant(n.b2)), n.hidden)


def qmoe(n: Network) -> ort.InferenceSession:
    """com.microsoft QMoE, 8 bits."""
    g = Graph()
    logits, w1, b1, w2 = routed(g, n)

    def packed(w: Array) -> tuple[str, str]:
        blocks = w.reshape(*w.shape[:2], -1, 32)
        scale = np.abs(blocks).max(axis=-1, keepdims=True) / 127
        values = np.rint(blocks / scale) + 128
        flat = values.astype(np.uint8).reshape(w.shape)
        return g.constant(flat), g.constant(scale[..., 0].astype(np.float32))

    (first, scale1), (second, scale2) = packed(w1), packed(w2)
    options = {"k": n.active, "activation_type": "gelu", "normalize_routing_weights": 1}
    inputs = ["x", logits, first, scale1, g.constant(b1), second, scale2]
    y = g.add(
        "QMoE",
        *inputs,
        domain="com.microsoft",
        expert_weight_bits=8,
        block_size=32,
        **options,
    )
    return g.session(g.add("Add", y, g.constant(n.b2)), n.hidden)


def conditional(n: Network) -> ort.InferenceSession:
    """If: one choice of experts for a text, by its mean; a batch of 1."""
    g = Graph()
    mean = g.add("ReduceMean", "x", g.constant(np.array([0, 1])), keepdims=0)
    logits = g.add("MatMul", mean, g.constant(n.router))
    _, places = g.add("TopK", logits, g.constant(np.array([n.active])), outputs=2)
    total = g.add("Mul", "x", g.constant(np.float32(0)))
    for e in range(n.experts):
        same = g.add("Equal", places, g.constant(np.array(e)))
        on = g.add("ReduceMax", g.add("Cast", same, to=TensorProto.INT32), keepdims=0)
        inner = Graph()
        inner.names = 10_000 * (e + 1)  # names are unique in all branches
        y = inner.add("Add", total, product(inner, "x", *n.expert(e)))
        kind = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
        yes = helper.make_graph(inner.nodes, f"on{e}", [], [kind], inner.constants)
        stay = inner.add("Identity", total)
        kind = helper.make_tensor_value_info(stay, TensorProto.FLOAT, None)
        no = helper.make_graph([inner.nodes[-1]], f"off{e}", [], [kind])
        condition = g.add("Cast", on, to=TensorProto.BOOL)
        total = g.add("If", condition, then_branch=yes, else_branch=no)
    return g.session(g.add("Add", total, g.constant(n.b2)), n.hidden)


def capacity(n: Network, length: int) -> ort.InferenceSession:
    """Every expert takes ``ceil(k T / E)`` tokens of each text: gather, multiply, add back."""
    g = Graph()
    share = math.ceil(n.active * length / n.experts)
    logits = g.add("MatMul", "x", g.constant(n.router))
    _, places = g.add("TopK", logits, g.constant(np.array([share])), axis=1, outputs=2)
    parts = g.add("Split", places, axis=2, num_outputs=n.experts, outputs=n.experts)
    spots = g.constant(np.arange(length)[:, None])
    total = ""
    for e, part in enumerate(parts):
        row = g.add("Transpose", part, perm=[0, 2, 1])
        hot = g.add(
            "Cast", g.add("Equal", row, spots), to=TensorProto.FLOAT
        )  # [B, T, C]
        taken = g.add("MatMul", g.add("Transpose", hot, perm=[0, 2, 1]), "x")
        y = g.add("MatMul", hot, product(g, taken, *n.expert(e)))
        total = g.add("Add", total, y) if total else y
    return g.session(g.add("Add", total, g.constant(n.b2)), n.hidden)


def expected(n: Network, way: str, x: Array) -> Array:
    """What a way should compute."""
    outputs = n.outputs(x)
    if way == "dense":
        mask = np.ones(outputs.shape[:-1])
    elif way == "static":
        mask = np.zeros(outputs.shape[:-1])
        mask[..., : n.active] = 1
    elif way == "If":
        mask = n.top(x.mean(axis=(0, 1)) @ n.router)
    elif way == "capacity":
        share = math.ceil(n.active * x.shape[1] / n.experts)
        order = np.argsort(-(x @ n.router), axis=1)[:, :share]
        mask = np.zeros(outputs.shape[:-1])
        np.put_along_axis(mask, order, 1.0, axis=1)
    else:
        mask = n.top(x @ n.router)
    total: Array = (outputs * mask[..., None]).sum(axis=-2) + n.b2
    return total


@click.command()
@click.option("--model", default="minilm", show_default=True)
@click.option("--experts", default=8, show_default=True)
@click.option("--active", default=4, show_default=True)
@click.option("--rounds", default=60, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(model: str, experts: int, active: int, rounds: int, output: Path) -> None:
    """Check every graph, then time all in turns; print a table, write JSON."""
    n = Network(model, experts, active)
    ways: dict[str, Callable[[int], ort.InferenceSession]] = {
        "dense": lambda length: plain(n, n.width),
        "static": lambda length: plain(n, n.size * n.active),
        "MoE": lambda length: mixture(n),
        "QMoE": lambda length: qmoe(n),
        "If": lambda length: conditional(n),
        "capacity": lambda length: capacity(n, length),
    }
    rows: list[dict[str, Any]] = []
    draw = np.random.default_rng(1)
    for batch in (1, 32):
        for length in (16, 64, 256):
            x = draw.standard_normal((batch, length, n.hidden)).astype(np.float32)
            few = x[:1]
            sessions = {}
            for way, make in ways.items():
                if way == "If" and batch > 1:
                    continue
                session = make(length)
                (given,) = session.run(None, {"x": few})
                due = expected(n, way, few)
                error = float(np.linalg.norm(given - due) / np.linalg.norm(due))
                # The operators approximate GELU; QMoE also rounds.
                if error > {"MoE": 2e-3, "QMoE": 3e-2}.get(way, 1e-4):
                    raise click.ClickException(f"{way} is wrong: {error:.4f}")
                sessions[way] = session
            times: dict[str, list[float]] = {way: [] for way in sessions}
            for turn in range(rounds + 5):
                for way, session in sessions.items():
                    began = time.perf_counter()
                    session.run(None, {"x": x})
                    if turn >= 5:
                        times[way].append(time.perf_counter() - began)
            p50 = {way: 1e3 * float(np.median(t)) for way, t in times.items()}
            rows.append({"batch": batch, "length": length, "p50_ms": p50})
            shown = "  ".join(f"{way} {t:.3f}" for way, t in p50.items())
            click.echo(f"batch {batch:2}, {length:3} tokens, ms: {shown}")
    about = {
        "model": model,
        "experts": experts,
        "active": active,
        "onnxruntime": ort.__version__,
        "onnx": onnx.__version__,
        "processor": platform.processor() or platform.machine(),
        "rows": rows,
    }
    output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
