"""Sparsify: saliency -> pattern -> refine, per linear layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from edgelm.compress import dsnot
from edgelm.compress.patterns import (
    Pattern,
    check_mask,
    check_width,
    make_mask,
    parse_pattern,
)
from edgelm.compress.saliency import SALIENCIES
from edgelm.errors import CompressionError
from edgelm.layers import weight_matrix
from edgelm.statistics import ActivationStatistics


@dataclass(frozen=True)
class Sparsify:
    """Set weights of the linear layers to zero.

    Attributes:
        sparsity: Fraction of zeros in each row, or a pattern ``"N:M"``: N non-zeros
            of every M along the input.
        saliency: How the first mask is chosen.
        refine: What improves it.
        dsnot: Parameters of DSnoT.
        skip: Layers to leave dense: parts of their names, for example ``"attention"``.
    """

    version: ClassVar[int] = 1
    needs_gram: ClassVar[bool] = True

    sparsity: float | str = 0.5
    saliency: Literal["magnitude", "wanda"] = "wanda"
    refine: Literal["none", "dsnot"] = "none"
    dsnot: dsnot.Dsnot = field(default_factory=dsnot.Dsnot)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: The sparsity or pattern is out of range.
        """
        parse_pattern(self.sparsity)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Errors are ``E|y - y'|^2 / E|y|^2`` of the layer's output over the calibration
    tokens, for its inputs as they are after the layers before it were compressed.

    Attributes:
        layer: Name in the model.
        shape: ``(out, in)``.
        sparsity: Fraction of its weights that are zero.
        error_initial: With the first mask.
        error: With the final one.
    """

    layer: str
    shape: tuple[int, int]
    sparsity: float
    error_initial: float
    error: float


def sparsify_block(
    linears: Mapping[str, nn.Module],
    config: Sparsify,
    statistics: Mapping[str, ActivationStatistics],
) -> list[LayerReport]:
    """Sparsify the linear layers of one block, in place.

    Args:
        linears: The layers by full name.
        config: What to do.
        statistics: Of each layer's input, with the Gram matrix.

    Returns:
        A report for each layer.

    Raises:
        CompressionError: A layer does not fit the pattern, or holds NaN.
    """
    pattern = parse_pattern(config.sparsity)
    reports = []
    for name, layer in linears.items():
        if any(part in name for part in config.skip):
            continue
        matrix = weight_matrix(layer)
        weight = matrix.float()
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"The weights of {name} are not finite.")
        check_width(pattern, weight.shape[1], name)
        initial, keep = sparse_mask(weight, config, pattern, statistics[name])
        gram = statistics[name].gram()
        reports.append(
            LayerReport(
                name,
                (weight.shape[0], weight.shape[1]),
                float((~keep).float().mean()),
                relative_error(weight, weight * initial, gram),
                relative_error(weight, weight * keep, gram),
            )
        )
        matrix.masked_fill_(~keep, 0.0)
    return reports


def sparse_mask(
    weight: torch.Tensor,
    config: Sparsify,
    pattern: Pattern,
    statistics: ActivationStatistics,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose which weights of a layer stay.

    Args:
        weight: ``[out, in]`` float32.
        config: What to do.
        pattern: Its pattern.
        statistics: Of the layer's input.

    Returns:
        The first mask and the final one, bool ``[out, in]``, both of the pattern.
    """
    saliency = SALIENCIES[config.saliency](weight, statistics)
    initial = make_mask(saliency, pattern)
    keep = initial
    if config.refine == "dsnot":
        keep = dsnot.refine(
            weight, initial, saliency, statistics, pattern, config.dsnot
        )
    check_mask(keep, pattern)
    return initial, keep


def relative_error(
    dense: torch.Tensor, sparse: torch.Tensor, gram: torch.Tensor
) -> float:
    """``E|(W - W') x|^2 / E|W x|^2`` from the Gram matrix ``E[x x^T]``.

    Args:
        dense: ``[out, in]``.
        sparse: ``[out, in]``.
        gram: ``[in, in]``.

    Returns:
        The ratio; 0 where the dense layer gives nothing.
    """
    change = dense - sparse
    lost = float(((change @ gram) * change).sum())
    there = float(((dense @ gram) * dense).sum())
    return max(lost, 0.0) / there if there > 0 else 0.0
