"""Sparsify: saliency -> pattern -> refine -> repair, per linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from edgelm.compress import admm, dsnot, obs, permute, swaps
from edgelm.compress.admm import Admm
from edgelm.compress.dsnot import Dsnot
from edgelm.compress.layer import Layer, LayerReport
from edgelm.compress.observe import OpenBlock
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
from edgelm.layers import weight_matrix


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
        drift: Where the repair solves for weights: the share of the drift (what the layers
            before have changed in this layer's output) that it makes up for.
        swaps: Parameters of the exact swaps.
        admm: Parameters of ADMM, as refinement and as repair.
        allocation: How a fraction is shared out among the blocks: alike; denser where
            outliers are (OWL); or denser at the front (progressive).
        band: Of the allocation: how far from the mean the first and the last block are
            (progressive); half of how far any two blocks are apart (OWL).
        permute: For N:M, bring the inner channels of each feed-forward network into an
            order in which the pattern keeps more; it costs nothing when running.
        skip: Layers to leave dense: parts of their names, for example ``"attention"``.
    """

    version: ClassVar[int] = 1

    sparsity: float | str = 0.5
    saliency: Literal["magnitude", "ria", "sparsegpt", "wanda"] = "wanda"
    refine: Literal["none", "dsnot", "swaps", "admm", "auto"] = "auto"
    repair: Literal["none", "bias", "admm", "sparsegpt", "auto"] = "auto"
    drift: float = 0.5
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
        if not 0 <= self.drift <= 1:
            raise ConfigError(
                f"The 'drift' parameter of Sparsify must be in [0, 1]. Got {self.drift} instead."
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

    @property
    def follows_drift(self) -> bool:
        """Whether it needs the hidden states of the model as it was."""
        return self.drift > 0 and self.repair in SOLVING


Refine = Callable[[Layer, torch.Tensor, torch.Tensor, Pattern, Sparsify], torch.Tensor]
Repair = Callable[[Layer, torch.Tensor, Pattern, Sparsify], torch.Tensor]

REFINEMENTS: dict[str, Refine] = {
    "none": lambda layer, keep, saliency, pattern, config: keep,
    "dsnot": lambda layer, keep, saliency, pattern, config: dsnot.refine(
        layer.aim, keep, saliency, layer.fit, pattern, config.dsnot
    ),
    "swaps": lambda layer, keep, saliency, pattern, config: swaps.refine(
        layer.aim, keep, layer.gram, pattern, config.swaps
    ),
    # A new mask, whatever the first one was.
    "admm": lambda layer, keep, saliency, pattern, config: admm.refine(
        layer.aim, layer.gram, pattern, config.admm
    ),
}
REPAIRS: dict[str, Repair] = {
    "none": lambda layer, keep, pattern, config: layer.aim * keep,
    "bias": lambda layer, keep, pattern, config: layer.aim * keep,
    "admm": lambda layer, keep, pattern, config: admm.repair(
        layer.aim, keep, layer.gram, config.admm
    ),
    "sparsegpt": lambda layer, keep, pattern, config: obs.prune(
        layer.aim, layer.gram, pattern, keep
    )[0],
}


# Repairs that solve for the weights that stay.
SOLVING = ("admm", "sparsegpt", "auto")
# What "auto" tries. In no layer of minilm did SparseGPT's repair or the mask of exact swaps
# do better than ADMM on its own mask, and both take long. Without a bias, "bias"
# is the masked weight as it is.
AUTO_REPAIRS = ("bias", "admm")
AUTO_REFINEMENTS = {True: ("none", "dsnot", "admm"), False: ("none", "dsnot", "swaps")}


def sparsify_block(block: OpenBlock, config: Sparsify) -> list[LayerReport]:
    """Sparsify the linear layers of one block, in place.

    Args:
        block: The block.
        config: What to do.

    Returns:
        A report for each layer.

    Raises:
        CompressionError: A layer does not fit the pattern, or is not finite.
    """
    pattern = parse_pattern(config.sparsity)
    where = block.where
    chosen = {
        name
        for name in where.linears
        if not any(part in block.full(name) for part in config.skip)
    }
    for name in where.linears:
        weight = weight_matrix(block.layer(name))
        if not bool(torch.isfinite(weight).all()):
            raise CompressionError(f"The weights of {block.full(name)} are not finite.")
        if name in chosen:
            check_width(pattern, weight.shape[1], block.full(name))
    if config.permute and where.ffn_out in chosen:
        _permute_(block, pattern, config)
    share = config.drift if config.follows_drift else 0.0
    reports = []
    for group in where.groups:
        names = [name for name in group if name in chosen]
        if not names:
            continue
        fit, held_out = block.observe(names, final=group is where.groups[-1])
        for name in names:
            module = block.layer(name)
            matrix, bias = weight_matrix(module), getattr(module, "bias", None)
            shifts = bias is not None and config.repair != "none"
            statistics = fit[name], held_out[name]
            layer = Layer(matrix.float(), shifts, *statistics, share)
            new, report = sparsify_layer(layer, pattern, config, block.full(name))
            shift = layer.shift(new)
            matrix.copy_(new)
            if bias is not None and shift is not None:
                bias.add_(shift.to(bias.dtype))
            reports.append(report)
    return reports


def _permute_(block: OpenBlock, pattern: Pattern, config: Sparsify) -> None:
    """Bring the network's inner channels into a better order, in every copy of the block."""
    last = block.where.ffn_out
    fit, _ = block.observe([last])
    saliency = SALIENCIES[config.saliency](
        weight_matrix(block.layer(last)).float(), fit[last]
    )
    order = permute.best_order(saliency, pattern)
    for module in (block.module, block.dense):
        if module is not None:
            producers = [module.get_submodule(name) for name in block.where.ffn_in]
            permute.reorder_(producers, module.get_submodule(last), order)


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
    saliency = SALIENCIES[config.saliency](layer.aim, layer.fit)
    initial = make_mask(saliency, pattern)
    error_initial = layer.error(layer.aim * initial)
    tried: dict[str, float] = {}

    solves = config.repair in SOLVING
    masks = {}
    for refine in (
        AUTO_REFINEMENTS[solves] if config.refine == "auto" else (config.refine,)
    ):
        keep = REFINEMENTS[refine](layer, initial, saliency, pattern, config)
        check_mask(keep, pattern)
        masks[refine] = keep
        same = keep is initial
        tried[refine] = error_initial if same else layer.error(layer.aim * keep)
    best = min(masks, key=lambda r: tried[r])
    # ADMM's mask shows what it is worth only once the weights are solved for.
    promising = {best, "admm"} & set(masks) if solves else {best}

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
