"""Least squares from moments: in double precision, scaled and damped."""

from __future__ import annotations

import torch

# Of the normalised diagonal, added to it.
DAMPING = 0.01


def normalised(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A Gram matrix with a diagonal of ones, and the root of the diagonal that it had.

    Args:
        gram: ``[in, in]``, symmetric, positive semi-definite; may be singular.

    Returns:
        float64 ``[in, in]`` and ``[in]``. A feature that is always zero gets the largest
        scale, and zeros in the matrix.
    """
    g = gram.double()
    scale = g.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, scale.max().clamp(min=1e-12))
    return g / torch.outer(scale, scale), scale


def solve(
    gram: torch.Tensor, target: torch.Tensor, damping: float = DAMPING
) -> torch.Tensor:
    """``target (gram + damping diag(gram))^-1``: ridge regression from moments.

    Args:
        gram: ``E[x x^T]``, ``[in, in]``; may be singular.
        target: ``E[y x^T]``, ``[out, in]``.
        damping: Of the diagonal, added to it.

    Returns:
        ``[out, in]``, in the dtype of ``target``.
    """
    g, scale = normalised(gram)
    g.diagonal().add_(damping)
    factor = torch.linalg.cholesky(g)
    right = (target.double() / scale).T
    return (torch.cholesky_solve(right, factor).T / scale).to(target.dtype)


def refit(weight: torch.Tensor, gram: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    """The weight on some inputs that comes nearest to the whole one on all.

    Args:
        weight: ``[out, in]``.
        gram: ``[in, in]``.
        left: int64, the inputs that stay.

    Returns:
        ``[out, in]``, zero elsewhere; the ridge pulls towards ``weight``.
    """
    gone = weight.clone()
    gone[:, left] = 0
    own = gram[left][:, left]
    new = weight - gone
    new[:, left] += solve(own, gone @ gram[:, left])
    return new
