"""ADMM: a mask found, and the weights that stay solved for, by the layer's output error alone.

Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024, arXiv
2401.02938. Both forms take the Gram matrix of the inputs and lower ``E|W x - W' x|^2``. Where
the layer has a bias, the mean of the error is the bias's to mend, in closed form and at no
cost (``b += (W - W') E[x]``); what the weights mend is then measured by the covariance.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from edgelm.compress.least_squares import normalised
from edgelm.compress.patterns import Pattern, make_mask, parse_pattern
from edgelm.errors import ConfigError


@dataclass(frozen=True)
class Admm:
    """Parameters of ADMM.

    Attributes:
        iterations: On a fixed mask.
        ramp: Iterations in which a mask tightens from dense to its pattern.
        damping: Added to the normalised Gram matrix's diagonal, of its mean.
        rho: Penalty, in units of the normalised diagonal.
    """

    iterations: int = 30
    ramp: int = 40
    damping: float = 0.01
    rho: float = 1.0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, low in (
            ("iterations", 1),
            ("ramp", 1),
            ("damping", 0),
            ("rho", 1e-6),
        ):
            value = getattr(self, name)
            if not value >= low:
                raise ConfigError(
                    f"The '{name}' parameter of Admm must be at least {low}. Got {value} instead."
                )


@dataclass(frozen=True)
class _System:
    """The normal equations of a layer, normalised by the Gram matrix's diagonal.

    Attributes:
        scale: Root of the diagonal, ``[in]``.
        dense: The weight in units of it, float32 ``[out, in]``.
        target: ``dense`` times the normalised, damped Gram matrix.
        inverse: Of that matrix plus ``rho``, float32 ``[in, in]``: its condition is at
            most width / rho.
    """

    scale: torch.Tensor
    dense: torch.Tensor
    target: torch.Tensor
    inverse: torch.Tensor


def refine(
    weight: torch.Tensor, gram: torch.Tensor, pattern: Pattern, config: Admm
) -> torch.Tensor:
    """Find a mask while solving for the weights: gradual pruning.

    In each of ``ramp`` iterations the smallest weights, in units of their input's norm, are
    pruned; how many follows the paper's cubic schedule ``s (1 - (1 - t)^3)``.

    Args:
        weight: Dense, ``[out, in]``.
        gram: ``[in, in]``.
        pattern: The pattern to end with.
        config: Parameters.

    Returns:
        bool ``[out, in]``: a mask that is good once the weights are solved for (`repair`).
    """
    system = _system(weight, gram, config)
    z, u = system.dense, torch.zeros_like(system.dense)
    keep = torch.ones_like(z, dtype=torch.bool)
    for step in range(1, config.ramp + 1):
        x = (system.target + config.rho * (z - u)) @ system.inverse
        keep = make_mask((x + u).abs(), _loosened(pattern, step / config.ramp))
        z = (x + u) * keep
        u = u + x - z
    return keep


def repair(
    weight: torch.Tensor, keep: torch.Tensor, gram: torch.Tensor, config: Admm
) -> torch.Tensor:
    """Least squares on the support.

    One factorisation, in double precision, serves all rows and iterations.

    Args:
        weight: Dense, ``[out, in]``.
        keep: bool ``[out, in]``.
        gram: ``[in, in]``.
        config: Parameters.

    Returns:
        ``[out, in]``, zero where pruned.
    """
    system = _system(weight, gram, config)
    kept = keep.to(system.dense.dtype)
    z, u = system.dense * kept, torch.zeros_like(system.dense)
    for _ in range(config.iterations):
        x = (system.target + config.rho * (z - u)) @ system.inverse
        z = (x + u) * kept
        u = u + x - z
    return (z / system.scale).to(weight.dtype)


def _system(weight: torch.Tensor, gram: torch.Tensor, config: Admm) -> _System:
    g, scale = normalised(gram)
    eye = torch.eye(len(g), dtype=g.dtype, device=g.device)
    g = g + config.damping * g.diagonal().mean() * eye
    dense = weight.double() * scale
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(g + config.rho * eye))
    return _System(scale.float(), dense.float(), (dense @ g).float(), inverse.float())


def _loosened(pattern: Pattern, progress: float) -> Pattern:
    """The pattern at a point of the schedule, 0 to 1; at 1 it is the pattern."""
    share = 1 - (1 - progress) ** 3
    if not pattern.group:
        return replace(pattern, sparsity=pattern.sparsity * share)
    pruned = round((pattern.group - pattern.n_keep) * share)
    return parse_pattern(f"{pattern.group - pruned}:{pattern.group}")
