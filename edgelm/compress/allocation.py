"""Allocation: how sparse each block shall be, so that the mean is what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from edgelm.compress.patterns import parse_pattern
from edgelm.compress.saliency import wanda
from edgelm.errors import ConfigError
from edgelm.layers import linears, of_config, weight_matrix

if TYPE_CHECKING:
    from edgelm.calibration import Batch
    from edgelm.compress.blocks import Blocks
    from edgelm.compress.sparsify import Sparsify

# A weight is an outlier where its |W| ||X|| is more than this times the block's mean:
# the paper's M for LLaMA.
_OUTLIER = 5.0


def plan(
    config: Sparsify, blocks: Blocks, step: int, batches: Sequence[Batch]
) -> list[Sparsify]:
    """The config of each block.

    Args:
        config: The config of the step.
        blocks: The model, as the step finds it; OWL reads it once from end to end.
        step: The step's number.
        batches: Calibration tokens.

    Raises:
        ConfigError: A block's sparsity would not be in [0, 1).
    """
    if config.allocation == "uniform":
        return [config] * len(blocks)
    mean = parse_pattern(config.sparsity).sparsity
    if config.allocation == "owl":
        found = owl(_outliers(blocks, step, batches), mean, config.band)
    else:
        found = progressive(len(blocks), mean, config.band)
    # Uniform from here on: a block's config is what was done to it.
    return [replace(config, sparsity=s, allocation="uniform") for s in found]


def owl(outliers: Sequence[float], sparsity: float, band: float) -> list[float]:
    """Blocks with more outliers stay denser (Yin et al. 2023, arXiv 2310.05175, "OWL").

    Args:
        outliers: For each block the share of its weights whose ``|W| ||X||`` is more than
            five times the block's mean.
        sparsity: Mean to reach.
        band: Lambda of the paper: no block is further than twice this from another.

    Returns:
        Sparsity of each block.
    """
    low, high = min(outliers), max(outliers)
    spread = [
        2 * band * (d - low) / (high - low) if high > low else 0.0 for d in outliers
    ]
    mean = sum(spread) / len(spread)
    return _within([sparsity - (d - mean) for d in spread])


def progressive(blocks: int, sparsity: float, band: float) -> list[float]:
    """An arithmetic progression: the first block densest (arXiv 2502.14770, "ATP").

    Args:
        blocks: How many.
        sparsity: Mean to reach.
        band: How far the first and the last block are from the mean.

    Returns:
        Sparsity of each block.
    """
    if blocks == 1:
        return _within([sparsity])
    return _within(
        [sparsity + band * (2 * i / (blocks - 1) - 1) for i in range(blocks)]
    )


def _outliers(blocks: Blocks, step: int, batches: Sequence[Batch]) -> list[float]:
    from edgelm.compress import sequential
    from edgelm.compress.observe import observe

    shares, where = [], of_config(blocks.model.config)
    with blocks.around(), blocks.open(step, 0):
        flows = sequential.start(blocks.model, batches, blocks.spill)
    for index in range(len(blocks)):
        with blocks.open(step, index) as block:
            statistics = observe(block, index, flows, where.linears, where)
            saliencies = [
                wanda(weight_matrix(module), statistics[name]).flatten()
                for name, module in linears(blocks.model, block)
            ]
            sequential.advance_(block, index, flows)
        count = sum(len(s) for s in saliencies)
        mean = sum(float(s.double().sum()) for s in saliencies) / count
        many = sum(int((s > _OUTLIER * mean).sum()) for s in saliencies)
        shares.append(many / count)
    return shares


def _within(sparsities: list[float]) -> list[float]:
    if min(sparsities) < 0 or max(sparsities) >= 1:
        raise ConfigError(
            f"This allocation asks for block sparsities from {min(sparsities):.2f} to {max(sparsities):.2f}; "
            "they must be in [0, 1). Choose a narrower band."
        )
    return sparsities
