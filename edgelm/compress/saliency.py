"""Saliency: how much a weight matters."""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgelm.compress import obs
from edgelm.statistics import ActivationStatistics


def magnitude(weight: torch.Tensor, statistics: ActivationStatistics) -> torch.Tensor:
    """``|W|``; ``[out, in]``."""
    return weight.abs()


def wanda(weight: torch.Tensor, statistics: ActivationStatistics) -> torch.Tensor:
    """``|W_ij| ||X_j||``, the norm per token (Sun et al. 2023, arXiv 2306.11695, eq. 1).

    The paper's norm is over all tokens, which scales every column alike and so
    ranks the same.
    """
    return weight.abs() * statistics.second_moment.sqrt()


def ria(weight: torch.Tensor, statistics: ActivationStatistics) -> torch.Tensor:
    """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) ||X_j||^(1/2)``.

    Relative importance and activations (Zhang et al., "Plug-and-Play", ICLR 2024),
    with the paper's exponent. A row or column of zeros matters nothing.
    """
    size = weight.abs()
    tiny = torch.finfo(size.dtype).tiny
    relative = size / size.sum(dim=0).clamp(min=tiny)
    relative = relative + size / size.sum(dim=1, keepdim=True).clamp(min=tiny)
    return relative * statistics.second_moment.pow(0.25)


def sparsegpt(weight: torch.Tensor, statistics: ActivationStatistics) -> torch.Tensor:
    """``W_ij^2 / U_jj^2``, SparseGPT's cost of removing a weight (arXiv 2301.00774).

    U is the upper Cholesky factor of the damped inverse Gram matrix.
    """
    return obs.removal_cost(weight, statistics.gram())


SALIENCIES: dict[str, Callable[[torch.Tensor, ActivationStatistics], torch.Tensor]] = {
    "magnitude": magnitude,
    "ria": ria,
    "sparsegpt": sparsegpt,
    "wanda": wanda,
}
