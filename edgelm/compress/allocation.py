"""Allocation: how sparse each block shall be, so that the mean is what was asked for."""

from __future__ import annotations

from collections.abc import Sequence

from edgelm.errors import ConfigError


def owl(outliers: Sequence[float], sparsity: float, band: float) -> list[float]:
    """Blocks with more outliers stay denser (Yin et al. 2023, arXiv 2310.05175, "OWL").

    Args:
        outliers: For each block the share of its weights whose ``|W| ||X||`` is more than
            five times the block's mean.
        sparsity: Mean to reach.
        band: Lambda of the paper: no block is further than this from the mean.

    Returns:
        Sparsity of each block.
    """
    low, high = min(outliers), max(outliers)
    spread = [
        2 * band * (d - low) / (high - low) if high > low else 0.0 for d in outliers
    ]
    mean = sum(spread) / len(spread)
    return _within([sparsity - (d - mean) for d in spread])


def progressive(blocks: int, sparsity: float, spread: float) -> list[float]:
    """An arithmetic progression: the first block densest (arXiv 2502.14770, "ATP").

    Args:
        blocks: How many.
        sparsity: Mean to reach.
        spread: Sparsity of the last block less that of the first.

    Returns:
        Sparsity of each block.
    """
    step = spread / max(blocks - 1, 1)
    return _within([sparsity + step * (i - (blocks - 1) / 2) for i in range(blocks)])


def _within(sparsities: list[float]) -> list[float]:
    if min(sparsities) < 0 or max(sparsities) >= 1:
        raise ConfigError(
            f"This allocation asks for block sparsities from {min(sparsities):.2f} to {max(sparsities):.2f}; "
            "they must be in [0, 1). Choose a narrower band."
        )
    return sparsities
