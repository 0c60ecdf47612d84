"""Sparsity patterns: which weights a mask may keep.

A mask is a bool tensor of the weight's shape ``[out, in]``; True keeps the weight.
Rows are compared only with themselves: every output keeps the same number of inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from edgelm.errors import CompressionError, ConfigError


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
    rows, width = saliency.shape
    if pattern.group:
        groups = saliency.reshape(rows, width // pattern.group, pattern.group)
        keep = torch.ones_like(groups, dtype=torch.bool)
        order = groups.argsort(dim=-1, stable=True)
        keep.scatter_(-1, order[..., : pattern.group - pattern.n_keep], False)
        return keep.reshape(rows, width)
    count = pruned_per_row(pattern, width)
    keep = torch.ones_like(saliency, dtype=torch.bool)
    order = saliency.argsort(dim=-1, stable=True)
    return keep.scatter_(-1, order[:, :count], False)


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
