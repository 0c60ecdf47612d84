"""What TensorRT's engine inspector says of an engine: the precision that really is in it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from edgelm.errors import SessionError

# How the inspector names types, in its several versions.
_TYPES = (
    ("bf16", re.compile(r"bfloat16|\bbfp?16\b", re.IGNORECASE)),
    ("fp16", re.compile(r"\bhalf\b|\bfp16\b|float16", re.IGNORECASE)),
    ("int8", re.compile(r"\bint8\b", re.IGNORECASE)),
    ("fp8", re.compile(r"\bfp8\b", re.IGNORECASE)),
    ("fp32", re.compile(r"\bfloat\b|\bfp32\b|float32", re.IGNORECASE)),
)
_PRODUCT = re.compile(
    r"gemm|matmul|matrix_?multiply|matrix multiply|fully_?connected|convolution|mha|attention",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Attributes:
        name: Its name; the parser's names of what was fused, joined.
        kind: What the inspector calls its type.
        types: Types of the tensors that it reads and gives, ``other`` for integers and
            what is not known.
    """

    name: str
    kind: str
    types: frozenset[str]

    @property
    def product(self) -> bool:
        """Whether it multiplies matrices, as far as its type and name tell."""
        return _PRODUCT.search(f"{self.kind} {self.name}") is not None


def read_layers(text: str) -> tuple[Layer, ...]:
    """Read the inspector's JSON.

    Raises:
        SessionError: It is no such JSON, or lists names only: the engine was built
            without detailed profiling.
    """
    try:
        listed = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise SessionError(
            f"TensorRT's engine inspector gives no list of layers: {text[:80]!r}."
        ) from error
    if any(isinstance(entry, str) for entry in listed):
        raise SessionError(
            "TensorRT's engine inspector gives names of layers only, so the engine's precision is not known. "
            "Build it again with edgelm build --force."
        )
    return tuple(_layer(entry) for entry in listed)


def _layer(entry: dict[str, Any]) -> Layer:
    tensors = [*entry.get("Inputs", ()), *entry.get("Outputs", ())]
    types = frozenset(_type(tensor.get("Format/Datatype", "")) for tensor in tensors)
    return Layer(entry.get("Name", ""), entry.get("LayerType", ""), types)


def _type(text: str) -> str:
    return next((name for name, pattern in _TYPES if pattern.search(text)), "other")


def count_types(layers: tuple[Layer, ...]) -> dict[str, int]:
    """How many layers touch each type."""
    return dict(sorted(Counter(t for layer in layers for t in layer.types).items()))


def check_precision(layers: tuple[Layer, ...], precision: str) -> None:
    """Refuse an engine that does not compute in what its bundle says.

    Args:
        layers: Of the engine.
        precision: The bundle's.

    Raises:
        SessionError: No matrix product of it, or no layer where none can be told to be
            a product, has that type.
    """
    products = tuple(layer for layer in layers if layer.product) or layers
    fitting = sum(precision in layer.types for layer in products)
    if not fitting:
        raise SessionError(
            f"The engine is not {precision}: of {len(products)} matrix products none has that type "
            f"(found: {count_types(products)}). It is not used."
        )
