"""What can be tried: configurations, and which of them make sense for a target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from edgelm.errors import ModelError
from edgelm.layers import ARCHITECTURES
from edgelm.recipe import PRESETS
from edgelm.targets import Target

Values = tuple[Any, ...]

_SIXTEENTHS = tuple(i / 16 for i in range(2, 17))
# Runtime -> parameter -> its values. Experts are not among them: no runtime gains by routing (docs/factorization.md).
# Nor are weights alone in few bits: they are for devices that wait for memory, and lose more than int8.
SPACES: dict[str, dict[str, Values]] = {
    "onnxruntime": {
        "neurons": _SIXTEENTHS,
        "allocation": ("uniform", "auto"),
        "heads": (0.5, 0.75, 1.0),
        "precision": ("int8", "fp16", "fp32"),
        "floats": (0, 2, 4, 8),
        "table_bits": (4, 8),
    },
    "openvino": {
        "neurons": _SIXTEENTHS,
        "allocation": ("uniform", "auto"),
        "heads": (0.5, 0.75, 1.0),
        "precision": ("int8", "fp32"),
        "floats": (0, 2, 4, 8),
    },
    "tensorrt": {
        "neurons": _SIXTEENTHS,
        "allocation": ("uniform", "auto"),
        "heads": (0.5, 0.75, 1.0),
        "sparsity": ("none", "2:4"),
        "precision": ("int8", "fp16", "bf16", "fp32"),
        "floats": (0, 2, 4, 8),
    },
}
# Float precisions for which TensorRT has sparse kernels; behind QuantizeLinear it takes none.
_SPARSE = ("fp16", "bf16")
_BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8}


@dataclass(frozen=True)
class Configuration:
    """A recipe and how it is exported.

    Attributes:
        neurons: Share of the feed-forward neurons that stay.
        allocation: How this share is shared out among the blocks, as for `Shrink`.
        heads: Share of the attention heads that stay.
        sparsity: ``2:4`` or ``none``.
        precision: As for `edgelm export`.
        floats: Groups of products that int8 leaves in float, the most sensitive first.
        table_bits: Bits of large embedding tables, where products are integers.
    """

    neurons: float = 1.0
    allocation: Literal["uniform", "auto"] = "uniform"
    heads: float = 1.0
    sparsity: Literal["none", "2:4"] = "none"
    precision: str = "int8"
    floats: int = 0
    table_bits: int = 8

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The steps of its recipe, as plain data; none for the dense model."""
        steps: list[dict[str, Any]] = []
        if self.heads < 1:
            steps.append({"method": "shrink", "part": "heads", "keep": self.heads})
        if self.neurons < 1:
            step = {"part": "neurons", "keep": self.neurons}
            steps.append({"method": "shrink", **step, "allocation": self.allocation})
        if self.sparsity != "none":
            more = {"refine": "auto", "repair": "auto"}
            steps.append({"method": "sparsify", "sparsity": self.sparsity, **more})
        return steps

    @property
    def dense(self) -> Configuration:
        """The same export of the model as it was."""
        return replace(
            self, neurons=1.0, allocation="uniform", heads=1.0, sparsity="none"
        )

    @property
    def weight_bits(self) -> int:
        """Bits of a weight of a product."""
        return _BITS[self.precision]

    @property
    def name(self) -> str:
        """For people."""
        parts = [] if self.neurons == 1 else [f"ffn {self.neurons:g}"]
        parts += ["auto"] if self.allocation == "auto" else []
        parts += [] if self.heads == 1 else [f"heads {self.heads:g}"]
        parts += [] if self.sparsity == "none" else [self.sparsity]
        parts = [*(parts or ["dense"]), self.precision]
        parts += [f"{self.floats} in float"] if self.floats else []
        parts += [f"tables {self.table_bits} bits"] if self.table_bits != 8 else []
        return ", ".join(parts)

    def features(self) -> list[float]:
        """What quality is predicted from, besides partial evaluations."""
        return [
            self.neurons,
            float(self.allocation == "auto"),
            self.heads,
            float(self.sparsity != "none"),
            float(self.weight_bits),
            float(self.floats),
            float(self.table_bits),
        ]


def normal(configuration: Configuration) -> Configuration:
    """The same without settings that say nothing where they stand."""
    c = configuration
    if c.neurons == 1:
        c = replace(c, allocation="uniform")
    if c.precision != "int8":
        c = replace(c, floats=0, table_bits=8)
    if c.precision not in _SPARSE:
        c = replace(c, sparsity="none")
    return c


def space_for(
    target: Target, architecture: str, *, table_bits: bool
) -> dict[str, Values]:
    """The parameters that make a difference, and their values.

    Args:
        target: The device.
        architecture: ``model_type`` of the model's config.
        table_bits: Whether the model has tables that are large enough for 4 bits.

    Raises:
        ModelError: Nobody knows where the architecture keeps its layers.
    """
    where = ARCHITECTURES.get(architecture)
    if where is None:
        raise ModelError(
            f"Models of type '{architecture}' cannot be compressed. Known types: {', '.join(sorted(ARCHITECTURES))}."
        )
    space = dict(SPACES[target.runtime])
    space["precision"] = tuple(p for p in space["precision"] if p in target.precisions)
    if not where.free_heads:
        del space["heads"]
    if target.gpu is None or not target.gpu.sparse_2_4:
        space.pop("sparsity", None)
    if not table_bits:
        space.pop("table_bits", None)
    return space


def presets(space: Mapping[str, Values]) -> list[Configuration]:
    """The dense model and the presets, in the first of the space's precisions."""
    precision = space["precision"][0]
    return [
        Configuration(neurons=share, precision=precision)
        for share in (1.0, *PRESETS.values())
    ]


def every(space: Mapping[str, Values]) -> Iterator[Configuration]:
    """All configurations of a space, each once."""
    seen = set()
    for values in product(*space.values()):
        found = normal(Configuration(**dict(zip(space, values, strict=True))))
        if found not in seen:
            seen.add(found)
            yield found
