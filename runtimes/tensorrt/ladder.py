"""What to try next when the builder runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LEAST_WORKSPACE_MIB = 128


@dataclass(frozen=True)
class Attempt:
    """Settings of one try.

    Attributes:
        workspace_mib: Memory that tactics may use.
        optimization_level: TensorRT's builder optimisation level, 0 to 5.
    """

    workspace_mib: int
    optimization_level: int


def attempts(
    workspace_mib: int, optimization_level: int, free_mib: int
) -> Iterator[Attempt]:
    """What to try, in order: smaller workspaces first, then lower levels.

    Args:
        workspace_mib: The workspace that is wished for.
        optimization_level: The level that is wished for.
        free_mib: Memory that is free; no try has a workspace of more than half of it.
            0 if it is not known.

    Yields:
        At least one attempt; no two are the same.
    """
    workspace = workspace_mib
    if free_mib:
        workspace = min(workspace, free_mib // 2)
    workspace = max(workspace, LEAST_WORKSPACE_MIB)
    yield Attempt(workspace, optimization_level)
    while workspace > LEAST_WORKSPACE_MIB:
        workspace = max(workspace // 2, LEAST_WORKSPACE_MIB)
        yield Attempt(workspace, optimization_level)
    for level in range(optimization_level - 1, -1, -1):
        yield Attempt(LEAST_WORKSPACE_MIB, level)
