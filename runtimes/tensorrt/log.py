"""What TensorRT's builder says in its log."""

from __future__ import annotations

import re
from dataclasses import dataclass

_ELIGIBLE = "(Sparsity) Layers eligible for sparse math:"
_PICKED = "(Sparsity) TRT inference plan picked sparse implementation for layers:"
_NO_MEMORY = re.compile(
    r"out of memory|OutOfMemory|cudaErrorMemoryAllocation|Cuda failure: ?2\b"
    r"|insufficient memory|std::bad_alloc|could not find any implementation",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Sparsity:
    """Layers with 2:4 weights, and those for which a sparse kernel was the fastest.

    Attributes:
        eligible: Layers whose weights are 2:4.
        picked: Those of them that really use a sparse kernel.
    """

    eligible: tuple[str, ...]
    picked: tuple[str, ...]


def read_sparsity(log: str) -> Sparsity:
    """Read what was eligible and what was picked; empty where the builder says nothing."""
    return Sparsity(_listed(log, _ELIGIBLE), _listed(log, _PICKED))


def _listed(log: str, prefix: str) -> tuple[str, ...]:
    names: list[str] = []
    for line in log.split("\n"):
        if prefix in line:
            rest = line.split(prefix, 1)[1]
            names += [name.strip() for name in rest.split(",") if name.strip()]
    return tuple(dict.fromkeys(names))


def ran_out_of_memory(log: str) -> bool:
    """Whether the builder gave up for want of memory.

    A builder that finds no implementation has usually refused all of them for their
    workspace, so that counts too.
    """
    return _NO_MEMORY.search(log) is not None
