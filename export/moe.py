"""com.microsoft's MoE behind a linear router: the nodes, for exports and benchmarks.

The operator (github.com/microsoft/onnxruntime, docs/ContribOperators.md) weighs a token's k experts by the
softmax of their logits; FactorLLM adds them up, times N/k. So its logits are 0 for the chosen
experts and `OFF` for the others, each weight is 1/k, and the second layers are multiplied by N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import require
from edgelm.export.editor import VENDOR

if TYPE_CHECKING:
    import onnx

# A logit that no softmax takes.
OFF = -1e4


def moe(
    x: str,
    out: str,
    weights: tuple[NDArray[Any], NDArray[Any], NDArray[Any]],
    router: tuple[NDArray[Any], NDArray[Any]],
    active: int,
    *,
    scale: float,
    activation: str = "gelu",
) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """com.microsoft's MoE behind a linear router: the active experts' outputs, added up.

    Args:
        x: Name of the input, float32 ``[..., H]``.
        out: Name of the output; of all names in between it is the beginning.
        weights: ``w1 [F, H]``, ``b1 [F]``, ``w2 [H, F]``, the experts' neurons side by side.
        router: ``[H, E]``, ``[E]``.
        active: k.
        scale: Of the second layers: ``k`` gives the plain sum, ``E`` FactorLLM's.
        activation: As the operator calls it.

    Returns:
        Nodes, the operator last, and constants by name.
    """
    node = require("onnx", "export").helper.make_node
    nodes, constants = choice(x, out, router, active)
    names = [f"{out}.{name}" for name in ("w1", "b1", "w2")]
    stack = stacked(*weights, experts=router[0].shape[1], scale=scale)
    constants |= zip(names, stack, strict=True)
    last = node(
        "MoE",
        [x, f"{out}.logits", *names],
        [out],
        name=f"{out}.MoE",
        domain=VENDOR,
        k=active,
        activation_type=activation,
        normalize_routing_weights=1,
    )
    return [*nodes, last], constants


def choice(
    x: str, out: str, router: tuple[NDArray[Any], NDArray[Any]], active: int
) -> tuple[list[onnx.NodeProto], dict[str, NDArray[Any]]]:
    """Logits for com.microsoft's operators: 0 for a token's experts, else `OFF`.

    Args:
        x: As for `moe`.
        out: The logits are its name with ``.logits``, float32 ``[T, E]``.
        router: ``[H, E]``, ``[E]``.
        active: k.

    Returns:
        Nodes, and constants by name.
    """
    made = require("onnx", "export").helper.make_node
    constants: dict[str, NDArray[Any]] = {
        f"{out}.router": np.ascontiguousarray(router[0]),
        f"{out}.shift": router[1],
        f"{out}.rows": np.array([-1, router[0].shape[0]]),
        f"{out}.active": np.array([active]),
        f"{out}.last": np.array([1]),
        f"{out}.on": np.zeros((), np.float32),
        f"{out}.off": np.full((), OFF, np.float32),
    }

    def node(kind: str, inputs: str, outputs: str, **settings: Any) -> Any:
        names = [n if n == x else f"{out}.{n}" for n in inputs.split()]
        given = [f"{out}.{n}" for n in outputs.split()]
        return made(kind, names, given, name=f"{given[0]}.{kind}", **settings)

    nodes = [
        node("Reshape", f"{x} rows", "tokens"),
        node("MatMul", "tokens router", "scores"),
        node("Add", "scores shift", "scored"),
        node("TopK", "scored active", "best places"),
        node("ReduceMin", "best last", "least"),
        node("Less", "scored least", "idle"),
        node("Where", "idle off on", "logits"),
    ]
    return nodes, constants


def stacked(
    w1: NDArray[Any], b1: NDArray[Any], w2: NDArray[Any], *, experts: int, scale: float
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Weights of all experts, ``[E, size, H]``, ``[E, size]``, ``[E, H, size]``; the last times ``scale``."""
    width, hidden = w1.shape
    size = width // experts
    second = w2.T.reshape(experts, size, hidden).transpose(0, 2, 1) * np.float32(scale)
    return (
        np.ascontiguousarray(w1).reshape(experts, size, hidden),
        b1.reshape(experts, size),
        np.ascontiguousarray(second),
    )
