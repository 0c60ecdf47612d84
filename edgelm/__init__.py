"""edgelm: make a Hugging Face text model small and fast without training it, and run it on the device.

HF model -> calibration statistics -> compressed Checkpoint -> ONNX -> Bundle
for a Target -> Session -> entities | vectors | scores
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgelm.errors import EdgelmError
from edgelm.runtimes import (
    Analyzer,
    Embedder,
    Entity,
    EntityRecognizer,
    Label,
    Ranked,
    Scorer,
    combine,
    load,
    rank,
)

if TYPE_CHECKING:
    from edgelm.runtimes import BinaryIndex

__version__ = "0.1.0"

__all__ = [
    "Analyzer",
    "BinaryIndex",
    "EdgelmError",
    "Embedder",
    "Entity",
    "EntityRecognizer",
    "Label",
    "Ranked",
    "Scorer",
    "__version__",
    "combine",
    "load",
    "rank",
]


def __getattr__(name: str) -> Any:
    if name == "BinaryIndex":
        from edgelm.runtimes import BinaryIndex

        return BinaryIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
