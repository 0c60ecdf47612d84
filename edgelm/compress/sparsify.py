"""Sparsify: saliency -> pattern -> refine -> repair, per linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import nn

from edgelm.compress import admm, dsnot, obs, permute, swaps
from edgelm.compress.admm import Admm
from edgelm.compress.dsnot import Dsnot
from edgelm.compress.patterns import (
    Pattern,
    check_mask,
    check_width,
    make_mask,
    parse_pattern,
)
from edgelm.compress.saliency import SALIENCIES
from edgelm.compress.swaps import Swaps
from edgelm.errors import CompressionError, ConfigError
from edgelm.layers import Architecture, weight_matrix
from edgelm.statistics import ActivationStatistics


@dataclass(frozen=True)
class Sparsify:
    """Set weights of the linear layers to zero.

    Attributes:
        sparsity: Fraction of zeros in each row, or a pattern ``"N:M"``: N non-zeros
            of every M along the input.
        saliency: How the first mask is chosen.
        refine: What improves the mask, or (ADMM) makes a new one; ``auto`` takes for
            each layer what leaves the smallest output error on held-out text.
        repair: What makes up for the pruned weights: the bias alone, or the bias and
            new values for the weights that stay; ``auto`` as for ``refine``.
        dsnot: Parameters of DSnoT.
        swaps: Parameters of the exact swaps.
        admm: Parameters of ADMM, as refinement and as repair.
        allocation: How a fraction is shared out among the blocks: alike; denser where
            outliers are (OWL); or denser at the front (progressive).
        band: How far a block's sparsity may be from the mean.
        permute: For N:M, bring the inner channels of each feed-forward network into an
            order in which the pattern keeps more; it costs nothing when running.
        skip: Layers to leave dense: parts of their names, for example ``"attention"``.
    """

    version: ClassVar[int] = 1

    sparsity: float | str = 0.5
    saliency: Literal["magnitude", "ria", "sparsegpt", "wanda"] = "wanda"
    refine: Literal["none", "dsnot", "swaps", "admm", "auto"] = "auto"
    repair: Literal["none", "bias", "admm", "sparsegpt", "auto"] = "auto"
    dsnot: Dsnot = field(default_factory=Dsnot)
    swaps: Swaps = field(default_factory=Swaps)
    admm: Admm = field(default_factory=Admm)
    allocation: Literal["uniform", "owl", "progressive"] = "uniform"
    band: float = 0.08
    permute: bool = False
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range, or does not go with the pattern.
        """
        pattern = parse_pattern(self.sparsity)
        if not 0 <= self.band < 0.5:
            raise ConfigError(
                f"The 'band' parameter of Sparsify must be in [0, 0.5). Got {self.band} instead."
            )
        if pattern.group and self.allocation != "uniform":
            raise ConfigError(
                f"The pattern {pattern} is the same in every block; the allocation "
                f"'{self.allocation}' needs a fraction of zeros, such as --sparsity {pattern.sparsity:g}."
            )
        if self.permute and not pattern.group:
            raise ConfigError(
                "Permuting channels helps only patterns N:M. Leave it out, or choose one, such as --sparsity 2:4."
            )


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Errors are ``E|y - y'|^2 / E|y|^2`` of the layer's output over held-out calibration
    tokens, for its inputs as they are after the layers before it were compressed. Where
    the bias takes up the mean of the error, they are what is left after that.

    Attributes:
        layer: Name in the model.
        shape: ``(out, in)``.
        sparsity: Fraction of its weights that are zero.
        error_initial: With the first mask.
        error_mask: With the refined mask.
        error: With the repaired weights.
        refine: What made the mask.
        repair: What repaired the weights.
        tried: Error of everything that was tried, by name.
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


@dataclass(frozen=True)
class Layer:
    """What a method needs to know of one linear layer.

    Attributes:
        weight: Dense, float32 ``[out, in]``.
        shifts: Whether the layer's bias takes up the mean of the error.
        fit: Statistics of its input to compute with.
        held_out: Statistics of its input to judge by.
    """

    weight: torch.Tensor
    shifts: bool
    fit: ActivationStatistics
    held_out: ActivationStatistics

    @property
    def gram(self) -> torch.Tensor:
        """What the weights must answer for: not the mean, where the bias does."""
        return self.fit.gram(centred=self.shifts)

    def shift(self, weight: torch.Tensor) -> torch.Tensor | None:
        """What a new weight makes the bias take up, ``[out]``: ``(W - W') E[x]``."""
        return (self.weight - weight) @ self.fit.mean if self.shifts else None

    def error(self, weight: torch.Tensor) -> float:
        """Relative output error of a new weight ``[out, in]`` on held-out tokens."""
        change = self.weight - weight
        covariance, mean = self.held_out.gram(centred=True), self.held_out.mean
        shift = self.shift(weight)
        rest = change @ mean if shift is None else change @ mean - shift
        lost = float(((change @ covariance) * change).sum() + rest.square().sum())
        return max(lost, 0.0) / self.energy if self.energy > 0 else 0.0

    @cached_property
    def energy(self) -> float:
        """``E|y|^2`` of the dense layer on held-out tokens, its bias left out."""
        gram = self.held_out.gram()
        return float(((self.weight @ gram) * self.weight).sum())


Refine = Callable[[Layer, torch.Tensor, torch.Tensor, Pattern, Sparsify], torch.Tensor]
Repair = Callable[[Layer, torch.Tensor, Pattern, Sparsify], torch.Tensor]

REFINEMENTS: dict[str, Refine] = {
    "none": lambda layer, keep, saliency, pattern, config: keep,
    "dsnot": lambda layer, keep, saliency, pattern, config: dsnot.refine(
        layer.weight, keep, saliency, layer.fit, pattern, config.dsnot
    ),
    "swaps": lambda layer, keep, saliency, pattern, config: swaps.refine(
        layer.weight, keep, layer.gram, pattern, config.swaps
    ),
    # A new mask, whatever the first one was.
    "admm": lambda layer, keep, saliency, pattern, config: admm.refine(
        layer.weight, layer.gram, pattern, config.admm
    ),
}
REPAIRS: dict[str, Repair] = {
    "none": lambda layer, keep, pattern, config: layer.weight * keep,
    "bias": lambda layer, keep, pattern, config: layer.weight * keep,
    "admm": lambda layer, keep, pattern, config: admm.repair(
        layer.weight, keep, layer.gram, config.admm
    ),
    "sparsegpt": lambda layer, keep, pattern, config: obs.prune(
        layer.weight, layer.gram, pattern, keep
    )[0],
}


# Without a bias, "bias" is the masked weight as it is.
AUTO_REPAIRS = ("bias", "admm", "sparsegpt")
# Repairs that solve for the weights that stay.
SOLVING = ("admm", "sparsegpt", "auto")


def sparsify_block(
    linears: Mapping[str, nn.Module],
    config: Sparsify,
    statistics: Mapping[str, ActivationStatistics],
    held_out: Mapping[str, ActivationStatistics],
    where: Architecture,
) -> list[LayerReport]:
    """Sparsify the linear layers of one block, in place.

    Args:
        linears: The layers by full name, in the order of the architecture.
        config: What to do.
        statistics: Of each layer's input, with the Gram matrix.
        held_out: The same over the text to judge by.
        where: The model's architecture.

    Returns:
        A report for each layer.

    Raises:
        CompressionError: A layer does not fit the pattern, or is not finite.
    """
    pattern = parse_pattern(config.sparsity)
    chosen = [n for n in linears if not any(part in n for part in config.skip)]
    for name in chosen:
        weight = weight_matrix(linears[name])
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"The weights of {name} are not finite.")
        check_width(pattern, weight.shape[1], name)
    last = list(linears)[-1]
    if config.permute and last in chosen:
        modules = list(linears.values())
        saliency = SALIENCIES[config.saliency](
            weight_matrix(modules[-1]).float(), statistics[last]
        )
        order = permute.best_order(saliency, pattern)
        permute.reorder_(modules[-1 - len(where.ffn_in) : -1], modules[-1], order)
        statistics = {**statistics, last: statistics[last].reordered(order)}
        held_out = {**held_out, last: held_out[last].reordered(order)}
    reports = []
    for name in chosen:
        module = linears[name]
        matrix = weight_matrix(module)
        bias = getattr(module, "bias", None)
        shifts = bias is not None and config.repair != "none"
        layer = Layer(matrix.float(), shifts, statistics[name], held_out[name])
        new, report = sparsify_layer(layer, pattern, config, name)
        shift = layer.shift(new)
        matrix.copy_(new)
        if bias is not None and shift is not None:
            bias.add_(shift.to(bias.dtype))
        reports.append(report)
    return reports


def sparsify_layer(
    layer: Layer, pattern: Pattern, config: Sparsify, name: str = ""
) -> tuple[torch.Tensor, LayerReport]:
    """Sparsify one layer.

    Args:
        layer: The layer.
        pattern: The pattern of ``config``.
        config: What to do.
        name: For the report.

    Returns:
        The new weight ``[out, in]`` and the report.

    Raises:
        CompressionError: A result is not finite or not of the pattern.
    """
    saliency = SALIENCIES[config.saliency](layer.weight, layer.fit)
    initial = make_mask(saliency, pattern)
    error_initial = layer.error(layer.weight * initial)
    tried: dict[str, float] = {}

    masks = {}
    for refine in REFINEMENTS if config.refine == "auto" else (config.refine,):
        keep = REFINEMENTS[refine](layer, initial, saliency, pattern, config)
        check_mask(keep, pattern)
        masks[refine] = keep
        same = keep is initial
        tried[refine] = error_initial if same else layer.error(layer.weight * keep)
    best = min(masks, key=lambda r: tried[r])
    # ADMM's mask shows what it is worth only once the weights are solved for.
    promising = {best, "admm"} & set(masks) if config.repair in SOLVING else {best}

    results = {}
    for refine in sorted(promising):
        for fix in AUTO_REPAIRS if config.repair == "auto" else (config.repair,):
            new = REPAIRS[fix](layer, masks[refine], pattern, config)
            if not bool(torch.isfinite(new).all()):
                raise CompressionError(f"The repair '{fix}' of {name} is not finite.")
            results[refine, fix] = new
            same = fix in ("none", "bias")
            tried[f"{refine}+{fix}"] = tried[refine] if same else layer.error(new)
    refine, fix = min(results, key=lambda pair: tried["+".join(pair)])
    new = results[refine, fix]
    report = LayerReport(
        name,
        (layer.weight.shape[0], layer.weight.shape[1]),
        float((new == 0).float().mean()),
        error_initial,
        tried[refine],
        tried[f"{refine}+{fix}"],
        refine,
        fix,
        tried,
    )
    return new, report
