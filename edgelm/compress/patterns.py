"""Sparsity patterns: which weights a mask may keep.

A mask is a bool tensor of the weight's shape ``[out, in]``; True keeps the weight.
Rows are compared only with themselves: every output keeps the same number of inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from edgelm.errors import CompressionError, ConfigError

# Values of a matrix that are worked on at a time: 1 MiB of float32.
_CHUNK = 1 << 18
# Up to so many values, comparing all pairs is faster than sorting.
_COMPARE = 8


@dataclass(frozen=True)
class Pattern:
    """How many weights are kept, and where.

    Attributes:
        sparsity: Fraction of zeros in each row, 0 <= sparsity < 1.
        n_keep: For N:M, non-zeros of every ``group`` along the input; else 0.
        group: For N:M, the group's size; else 0.
    """

    sparsity: float
    n_keep: int = 0
    group: int = 0

    def __str__(self) -> str:
        """As `parse_pattern` reads it."""
        return f"{self.n_keep}:{self.group}" if self.group else f"{self.sparsity:g}"


def parse_pattern(text: float | str) -> Pattern:
    """Read ``0.5`` (half of each row zero) or ``"2:4"`` (2 kept of every 4 inputs).

    Raises:
        ConfigError: It is neither, or out of range.
    """
    match = re.fullmatch(r"(\d+):(\d+)", str(text).strip())
    if match:
        n_keep, group = int(match[1]), int(match[2])
        if not 1 <= n_keep <= group:
            raise ConfigError(
                f"The pattern N:M keeps N of every M inputs, with 1 <= N <= M. Got {text} instead."
            )
        return Pattern(1 - n_keep / group, n_keep, group)
    try:
        sparsity = float(text)
    except ValueError:
        sparsity = -1.0
    if not 0 <= sparsity < 1:
        raise ConfigError(
            "The 'sparsity' parameter must be a fraction of zeros in [0, 1), or a pattern N:M such as 2:4. "
            f"Got {text} instead."
        )
    return Pattern(sparsity)


def check_width(pattern: Pattern, width: int, layer: str) -> None:
    """Raise `CompressionError` if a layer's inputs do not divide into groups."""
    if pattern.group and width % pattern.group:
        raise CompressionError(
            f"The pattern {pattern} needs a multiple of {pattern.group} inputs; {layer} has {width}. "
            "Leave the layer out with --skip, or choose another pattern."
        )


def pruned_per_row(pattern: Pattern, width: int) -> int:
    """Zeros of a row: the fraction rounded down to a whole number of weights."""
    if pattern.group:
        return width // pattern.group * (pattern.group - pattern.n_keep)
    return int(width * pattern.sparsity + 1e-9)


def make_mask(saliency: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Keep the most salient weights that a pattern allows.

    Args:
        saliency: ``[out, in]`` float; larger is more important. Ties prune the
            weight with the lower index.
        pattern: What is allowed.

    Returns:
        bool ``[out, in]``; exactly `pruned_per_row` False in each row.
    """
    keep = torch.empty_like(saliency, dtype=torch.bool)
    for rows in row_chunks(saliency):
        part = saliency[rows]
        if pattern.group:
            groups = part.reshape(len(part), -1, pattern.group)
            kept = ranks(groups) >= pattern.group - pattern.n_keep
            keep[rows] = kept.reshape(part.shape)
        else:
            keep[rows] = _above(part, pruned_per_row(pattern, part.shape[1]))
    return keep


def row_chunks(matrix: torch.Tensor) -> list[slice]:
    """Runs of rows, each small enough to stay in a core's cache through many operations."""
    size = (
        max(1, _CHUNK // max(matrix.shape[1], 1))
        if matrix.device.type == "cpu"
        else len(matrix)
    )
    return [slice(i, i + size) for i in range(0, len(matrix), max(size, 1))]


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Place of each value in the ascending order of its last axis; ties by index.

    Args:
        values: ``[..., n]``; n is small.

    Returns:
        An integer tensor of the same shape.
    """
    n = values.shape[-1]
    if n > _COMPARE:
        order = values.argsort(dim=-1, stable=True)
        numbers = torch.arange(n, device=values.device).expand_as(order)
        return torch.empty_like(order).scatter_(-1, order, numbers)
    columns = [values[..., i].contiguous() for i in range(n)]
    # Of a pair the later is ranked higher, unless it is smaller.
    places = [
        torch.full_like(c, n - 1 - i, dtype=torch.uint8) for i, c in enumerate(columns)
    ]
    for i in range(n):
        for j in range(i):
            after = (columns[j] <= columns[i]).view(torch.uint8)
            places[i] += after
            places[j] -= after
    return torch.stack(places, dim=-1)


def _above(saliency: torch.Tensor, count: int) -> torch.Tensor:
    """All but the ``count`` smallest of each row; ties prune the lower index."""
    if count == 0:
        return torch.ones_like(saliency, dtype=torch.bool)
    limit = saliency.kthvalue(count, dim=1, keepdim=True).values
    keep = saliency > limit
    excess = keep.sum(dim=1, keepdim=True) < saliency.shape[1] - count
    if bool(excess.any()):  # some of those at the limit stay
        at = saliency == limit
        fewer = (saliency < limit).sum(dim=1, keepdim=True)
        keep |= at & (at.cumsum(dim=1) > count - fewer)
    return keep


def check_mask(keep: torch.Tensor, pattern: Pattern) -> None:
    """Raise `CompressionError` unless a mask is exactly of a pattern.

    Args:
        keep: bool ``[out, in]``.
        pattern: The pattern that it must have.
    """
    rows, width = keep.shape
    if pattern.group:
        counts = keep.reshape(rows, -1, pattern.group).sum(dim=-1)
        wanted = pattern.n_keep
    else:
        counts = keep.sum(dim=-1)
        wanted = width - pruned_per_row(pattern, width)
    if bool((counts != wanted).any()):
        raise CompressionError(f"A mask does not have the pattern {pattern}.")
