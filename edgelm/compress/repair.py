"""Repair: new values for the weights that stay, so that the layer gives what it gave.

All of them take a fixed mask and lower ``E|W x - W' x|^2`` from the Gram matrix of the
inputs alone. Where the layer has a bias, the mean of the error is the bias's to mend, in
closed form and at no cost (``b += (W - W') E[x]``); what the weights mend is then measured
by the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgelm.compress.obs import prune
from edgelm.compress.patterns import Pattern
from edgelm.errors import ConfigError


@dataclass(frozen=True)
class Admm:
    """Parameters of the ADMM update.

    Attributes:
        iterations: How many.
        damping: Added to the normalised Gram matrix's diagonal, of its mean.
        rho: Penalty, in units of the normalised diagonal.
    """

    iterations: int = 30
    damping: float = 0.01
    rho: float = 1.0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, low in (("iterations", 1), ("damping", 0), ("rho", 1e-6)):
            value = getattr(self, name)
            if not value >= low:
                raise ConfigError(
                    f"The '{name}' parameter of Admm must be at least {low}. Got {value} instead."
                )


def admm(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, config: Admm
) -> torch.Tensor:
    """Least squares on the support by ADMM (Boza 2024, arXiv 2401.02938).

    The Gram matrix is normalised by its diagonal, as there; one factorisation, in double
    precision, serves all rows and iterations. Deviation: the mask is fixed from the start.

    Args:
        weight: Dense, ``[out, in]``.
        keep: bool ``[out, in]``.
        gram: ``[in, in]``.
        config: Parameters.

    Returns:
        ``[out, in]``, zero where pruned.
    """
    g = gram.double()
    scale = g.diagonal().clamp(min=0).sqrt()
    scale = torch.where(scale > 0, scale, scale.max().clamp(min=1e-12))
    g = g / torch.outer(scale, scale)
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    g = g + config.damping * g.diagonal().mean() * eye
    dense = weight.double() * scale
    target = (dense @ g).float()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(g + config.rho * eye))
    inverse = inverse.float()  # its condition is at most width / rho
    z = dense.float().masked_fill(~keep, 0.0)
    u = torch.zeros_like(z)
    for _ in range(config.iterations):
        x = (target + config.rho * (z - u)) @ inverse
        z = (x + u).masked_fill(~keep, 0.0)
        u = u + x - z
    return (z / scale).to(weight.dtype)


def sparsegpt(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, pattern: Pattern
) -> torch.Tensor:
    """SparseGPT's update under a fixed mask; see `edgelm.compress.obs.prune`."""
    return prune(weight, gram, pattern, keep)[0]
