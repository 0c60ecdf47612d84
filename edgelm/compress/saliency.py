"""Saliency: how much a weight matters."""

from __future__ import annotations

from collections.abc import Callable

import torch

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


SALIENCIES: dict[str, Callable[[torch.Tensor, ActivationStatistics], torch.Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
}
