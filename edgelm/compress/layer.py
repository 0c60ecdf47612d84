"""One linear layer: what a method needs to know of it, and what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from edgelm.compress import least_squares
from edgelm.statistics import ActivationStatistics


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Errors are ``E|y - y'|^2 / E|y|^2`` over held-out calibration tokens: y' is the layer's
    output for its inputs as they are after the layers before it were compressed, y what
    the dense layer gives on them, with the share of the drift that is to be made up for.
    Where the bias takes up the mean of the error, they are what is left after that.

    Attributes:
        layer: Name in the model.
        shape: ``(out, in)``.
        sparsity: Fraction of its weights that are zero, or of its inputs that are gone.
        error_initial: With the first mask, or without the units that vary least.
        error_mask: With the refined mask, or without the units that were chosen.
        error: With the repaired weights.
        refine: What made the mask.
        repair: What repaired the weights.
        tried: Error of everything that was tried, by name.
        parts: The layers that became smaller with it, itself among them; empty for it alone.
    """

    layer: str
    shape: tuple[int, int]
    sparsity: float
    error_initial: float
    error_mask: float
    error: float
    refine: str
    repair: str
    tried: Mapping[str, float]
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """What a method needs to know of one linear layer.

    Attributes:
        weight: Dense, float32 ``[out, in]``.
        shifts: Whether the layer's bias takes up the mean of the error.
        fit: Statistics of its input to compute with.
        held_out: Statistics of its input to judge by.
        drift: Share of the drift to make up for.
    """

    weight: torch.Tensor
    shifts: bool
    fit: ActivationStatistics
    held_out: ActivationStatistics
    drift: float = 0.0

    @cached_property
    def gram(self) -> torch.Tensor:
        """What the weights must answer for: not the mean, where the bias does."""
        return self.fit.gram(centred=self.shifts)

    @cached_property
    def aim(self) -> torch.Tensor:
        """The dense weight that would do best, ``[out, in]``: pruning starts from it.

        The wanted output is ``W x + drift d``. To come near it with another weight is to
        come near ``aim x``: ``aim`` solves the least squares problem, so what it leaves
        is orthogonal to x. It is ``W`` where held-out text says that d cannot be told
        from x.
        """
        if not self.drift:
            return self.weight
        moved = self.drift * self.fit.drift(centred=self.shifts)
        solved = self.weight + least_squares.solve(self.gram, moved)
        return solved if self.error(solved) < self.error(self.weight) else self.weight

    def shift(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What a new weight makes the bias take up, ``[out]``: the mean of the error."""
        if not self.shifts:
            return None
        shift = (self.weight - weight) @ self.fit.mean
        return shift + self.drift * self.fit.drift_mean if self.drift else shift

    def error(self, weight: torch.Tensor) -> float:
        """Relative output error of a new weight ``[out, in]`` on held-out tokens."""
        change, seen = self.weight - weight, self.held_out
        rest = change @ seen.mean
        lost = ((change @ seen.gram(centred=True)) * change).sum()
        if self.drift:
            moved = self.drift * seen.drift(centred=True)
            lost = lost + 2 * (change * moved).sum()
            lost = lost + self.drift**2 * seen.drift_variance.sum()
            rest = rest + self.drift * seen.drift_mean
        shift = self.shift(weight)
        if shift is not None:
            rest = rest - shift
        error = float(lost + rest.square().sum())
        return max(error, 0.0) / self.energy if self.energy > 0 else 0.0

    @cached_property
    def energy(self) -> float:
        """``E|y|^2`` of the dense layer on held-out tokens, its bias left out."""
        gram = self.held_out.gram()
        return float(((self.weight @ gram) * self.weight).sum())
