"""Whether a model fits a device, before any work: memory at build and at run, precision, sparsity.

The prediction counts weights and the activations of the largest profile; it is a bound to plan by, not a
measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgelm.errors import TargetError
from edgelm.targets import EngineBuild, Target

# Bytes of a weight of a matrix product, and of an embedding table.
_BYTES = {
    "fp32": (4, 4),
    "fp16": (2, 2),
    "bf16": (2, 2),
    "int8": (1, 2),
    "int8-weights": (1, 1),
    "int4-weights": (0.5, 1),
}
# Not measured: what CUDA, TensorRT's libraries and Python take beside the engine, MiB.
BASE_MIB = 600
# The builder tries tactics in this even where it is told to be frugal, MiB.
LEAST_WORKSPACE_MIB = 256
# Tensors of a layer that live at once, in units of the hidden and of the inner width.
_HIDDEN, _INNER = 6, 2


@dataclass(frozen=True)
class Network:
    """What a model needs memory for.

    Attributes:
        parameters: All of its weights.
        table_parameters: Those of its embedding tables.
        hidden: Hidden width.
        inner: Inner width of the feed-forward network.
        heads: Attention heads.
        longest: Longest input, tokens.
    """

    parameters: int
    table_parameters: int
    hidden: int
    inner: int
    heads: int
    longest: int


@dataclass(frozen=True)
class Fit:
    """What is predicted of a model on a device.

    Attributes:
        weights_mib: Size of the weights in the engine.
        run_mib: Memory when it runs the largest profile.
        build_mib: Memory when the engine is built, with the least workspace; 0 where
            no engine is built.
        available_mib: Memory that the device has for it; None if the target is no one device.
        notes: What will not be as one might expect, one sentence each.
    """

    weights_mib: float
    run_mib: float
    build_mib: float
    available_mib: int | None
    notes: tuple[str, ...]


def check_fit(
    target: Target, network: Network, precision: str, *, sparse_2_4: bool = False
) -> Fit:
    """Predict what a model needs on a device.

    Args:
        target: The device.
        network: The model.
        precision: What it is exported in.
        sparse_2_4: Whether its weights are 2:4 sparse.

    Raises:
        TargetError: It will not fit, or the device cannot compute so; the field of the
            target that says so is named.
    """
    formats = target.gpu.formats if target.gpu else None
    if (
        formats is not None
        and precision in ("fp16", "bf16", "int8")
        and precision not in formats
    ):
        raise TargetError(
            f"{target.title} does not compute in {precision}: its gpu.formats are {', '.join(formats)}."
        )
    product, table = _BYTES[precision]
    weights = network.parameters - network.table_parameters
    engine = (weights * product + network.table_parameters * table) / 2**20
    graph = network.parameters * 4 / 2**20
    work = _activations(network, target.engine) / 2**20
    run = engine + work + BASE_MIB
    build = 0.0
    if target.engine is not None:
        # The graph and the parser's copy; the engine and its serialised copy.
        build = 2 * graph + 2 * engine + work + LEAST_WORKSPACE_MIB + BASE_MIB
    available = None
    if target.memory is not None:
        reserved = target.engine.reserved_mib if target.engine else 0
        available = target.memory.total_mib - reserved
        for need, what in ((build, "build the engine"), (run, "run")):
            if need > available:
                raise TargetError(
                    f"{target.title} is too small: to {what}, about {need:.0f} MiB are needed, and of its "
                    f"memory.total_mib, {target.memory.total_mib}, {available} are free. "
                    "Compress the model further, or choose a larger device."
                )
    return Fit(engine, run, build, available, _notes(target, precision, sparse_2_4))


def _activations(network: Network, engine: EngineBuild | None) -> float:
    """Bytes of a layer's tensors in the largest profile, float32."""
    batch = engine.batch[-1] if engine else 1
    longest = network.longest
    token = _HIDDEN * network.hidden + _INNER * network.inner
    return 4.0 * batch * longest * (token + 2 * network.heads * longest)


def _notes(target: Target, precision: str, sparse: bool) -> tuple[str, ...]:
    notes = []
    if sparse and target.gpu is not None:
        if not target.gpu.sparse_2_4:
            notes.append(
                "its gpu.sparse_2_4 is false: the 2:4 weights are smaller to store, not faster"
            )
        elif precision == "int8":
            notes.append(
                "TensorRT takes no sparse kernel behind QuantizeLinear (github.com/NVIDIA/TensorRT issue 4694): "
                "expect 2:4 to speed up fp16, not int8"
            )
    return tuple(notes)
