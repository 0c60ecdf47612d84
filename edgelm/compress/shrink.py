"""Shrink: whole neurons or heads removed, the projection behind them solved for again.

What is left is an ordinary, smaller, dense model. Units are chosen by optimal brain surgery
on the projection (Hassibi and Stork 1993; for units of a transformer: Kurtic et al., "ZipLM",
2023, arXiv 2302.04089) or by the variance of what they contribute (An et al., "FLAP", 2024, arXiv
2312.11983); the mean of what is gone goes into the bias. The projection is then the ridge
regression of what it should give on what is left, drift and residual included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from edgelm import widths
from edgelm.compress import least_squares, obs, sequential
from edgelm.compress.judge import Tokens, judge
from edgelm.compress.layer import Layer, LayerReport
from edgelm.compress.observe import observe, stream_variance
from edgelm.errors import CompressionError, ConfigError
from edgelm.layers import of_config, weight_matrix
from edgelm.streaming import set_parameters_

if TYPE_CHECKING:
    from edgelm.calibration import Batch
    from edgelm.compress.blocks import Blocks
    from edgelm.compress.observe import OpenBlock

# Most tokens that experts are made of and judged by.
_JUDGED_TOKENS = 16384


@dataclass(frozen=True)
class Shrink:
    """Remove neurons of the feed-forward networks, or heads of attention.

    Attributes:
        part: What is removed. With fewer key and value heads than query heads, a unit
            is one of the former with all of the latter that use it.
        keep: Fraction that stays, over all blocks.
        allocation: ``uniform``, the same in every block; ``auto``, so that the last units
            removed lost every block the same share of the residual stream's variance.
        band: With ``auto``, how far a block's share may be from ``keep``: what is lost early
            costs more than it seems where it is lost.
        score: How units are chosen: ``obs``, what is lost when all others make up for
            it; ``variance``, of the unit's own contribution.
        multiple: Numbers of neurons are rounded to multiples of this.
        drift: Share of the drift (what the layers before have changed in the projection's
            output) that it makes up for.
        experts: Judge on the way whether routing would do better: this many experts, of
            which ``keep`` are active (`edgelm.compress.judge`); 0 for no judgement. The
            result is the static network in any case.
        skip: Layers to leave as they are: parts of the projections' names.
    """

    version: ClassVar[int] = 1

    part: Literal["neurons", "heads"] = "neurons"
    keep: float = 0.5
    allocation: Literal["auto", "uniform"] = "uniform"
    band: float = 0.15
    score: Literal["obs", "variance"] = "obs"
    multiple: int = 16
    drift: float = 0.5
    experts: int = 0
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, value, fits, due in (
            ("keep", self.keep, 0 < self.keep <= 1, "in (0, 1]"),
            ("band", self.band, 0 <= self.band <= 1, "in [0, 1]"),
            ("drift", self.drift, 0 <= self.drift <= 1, "in [0, 1]"),
            ("multiple", self.multiple, self.multiple >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(
                    f"The '{name}' parameter of Shrink must be {due}. Got {value} instead."
                )
        if self.experts and (self.part, self.allocation) != ("neurons", "uniform"):
            raise ConfigError(
                "Experts are of neurons, and as many are active in every block: leave out heads and auto."
            )
        active = self.keep * self.experts
        if self.experts < 0 or abs(active - round(active)) > 1e-6:
            raise ConfigError(
                f"Of {self.experts} experts a whole number must be active. Got {active:g} instead."
            )

    @property
    def follows_drift(self) -> bool:
        """Whether it needs the hidden states of the model as it was."""
        return self.drift > 0


def by_variance(
    weight: torch.Tensor, gram: torch.Tensor, size: int, keep: int
) -> torch.Tensor:
    """The units that contribute most: ``sum_j G_jj |W_j|^2``, int64 ``[keep]`` in order."""
    each = gram.diagonal() * weight.square().sum(dim=0)
    found = each.reshape(-1, size).sum(dim=1).topk(keep).indices
    return found.sort().values


Score = Callable[[torch.Tensor, torch.Tensor, int, int], torch.Tensor]

SCORES: dict[str, Score] = {
    "obs": lambda *problem: obs.remove_units(*problem)[0],
    "variance": by_variance,
}


def columns(units: torch.Tensor, size: int) -> torch.Tensor:
    """The inputs of units, int64 ``[units * size]``."""
    return (
        units.unsqueeze(1) * size + torch.arange(size, device=units.device)
    ).flatten()


def plan(
    config: Shrink, blocks: Blocks, step: int, batches: Sequence[Batch]
) -> list[Shrink]:
    """The config of each block.

    Args:
        config: The config of the step.
        blocks: The model, as the step finds it; ``auto`` reads it once from end to end.
        step: The step's number.
        batches: Calibration tokens.

    Raises:
        CompressionError: The architecture's heads cannot be removed.
    """
    kind = blocks.model.config.model_type
    where = of_config(blocks.model.config)
    if config.part == "heads" and not where.free_heads:
        raise CompressionError(
            f"The attention of '{kind}' needs all its heads. Remove neurons instead."
        )
    if config.allocation == "uniform":
        return [config] * len(blocks)
    name = where.ffn_out if config.part == "neurons" else where.attention_out
    curves = []
    with blocks.around(), blocks.open(step, 0):
        flows = sequential.start(blocks.model, batches, blocks.spill)
    for index in range(len(blocks)):
        with blocks.open(step, index) as block:
            found = observe(block, index, flows, [name], where)[name]
            module = block.get_submodule(name)
            weight = weight_matrix(module).float()
            layer = Layer(
                weight, getattr(module, "bias", None) is not None, found, found
            )
            units = widths.of_block(blocks.model.config, block, config.part)
            size = weight.shape[1] // units
            costs = obs.remove_units(weight, layer.gram, size, 1)[1]
            stream = stream_variance(block, index, flows, name, where)
            curves.append(costs / max(stream, 1e-30))
            sequential.advance_(block, index, flows)
    counts = allocate(curves, config.keep, _grain(config), config.band)
    return [
        replace(config, keep=count / (len(curve) + 1), allocation="uniform")
        for count, curve in zip(counts, curves, strict=True)
    ]


def allocate(
    curves: Sequence[torch.Tensor], keep: float, multiple: int, band: float = 1.0
) -> list[int]:
    """How many units each block keeps, so that what is lost in all is least.

    Args:
        curves: For each block what is lost, ascending, when 1, 2, ... units are gone;
            one fewer than it has.
        keep: Fraction of all units that stays.
        multiple: Units go in steps of so many.
        band: How far a block's fraction may be from ``keep``.

    Returns:
        Number of units for each block; multiples where the block's own number is one.
    """
    steps: list[tuple[float, int]] = []
    for block, curve in enumerate(curves):
        units = len(curve) + 1
        worst, before = 0.0, 0.0
        for end in range(multiple, units, multiple):
            left, now = (units - end) / units, float(curve[end - 1])
            # Not below the step before it, which has to come first.
            worst, before = max(worst, now - before), now
            if left > keep + band:
                worst = 0.0
            elif left < keep - band:
                break
            steps.append((worst, block))
    whole = sum(len(curve) + 1 for curve in curves)
    steps.sort(key=lambda s: s[0])
    goes = steps[: round(whole * (1 - keep) / multiple)]
    return [
        len(curve) + 1 - multiple * sum(b == block for _, b in goes)
        for block, curve in enumerate(curves)
    ]


def shrink_block(block: OpenBlock, config: Shrink) -> list[LayerReport]:
    """Remove units of one block, in place.

    Args:
        block: The block.
        config: What to do; the allocation is uniform.

    Returns:
        A report of the projection behind the units; none where it is to be skipped.

    Raises:
        CompressionError: Its weights are not finite.
    """
    where = block.where
    neurons = config.part == "neurons"
    name = where.ffn_out if neurons else where.attention_out
    full, module = block.full(name), block.layer(name)
    if any(part in full for part in config.skip):
        return []
    matrix, bias = weight_matrix(module).float(), getattr(module, "bias", None)
    if not bool(torch.isfinite(matrix).all()):
        raise CompressionError(f"The weights of {full} are not finite.")
    units = widths.of_block(block.config, block.module, config.part)
    size, grain = matrix.shape[1] // units, _grain(config)
    keep = min(max(round(units * config.keep / grain), 1) * grain, units)

    judged = _judged(block, matrix, config) if config.experts else {}
    fit, held_out = block.observe([name], final=True)
    layer = Layer(matrix, bias is not None, fit[name], held_out[name], config.drift)
    problem = layer.aim, layer.gram, size, keep
    kept = SCORES[config.score](*problem)
    left = columns(kept, size)
    new = least_squares.refit(layer.aim, layer.gram, left)
    shift = layer.shift(new)
    if bias is not None and shift is not None:
        bias.add_(shift.to(bias.dtype))
    weight_matrix(module).copy_(new)

    weights = {key: p.detach() for key, p in block.module.named_parameters()}
    change = widths.take(kept)
    smaller = widths.map_units(weights, where, config.part, units, change)
    set_parameters_(block.module, smaller)
    producers = where.ffn_in if neurons else where.attention_in
    dropped = layer.error(_only(layer.aim, left))
    initial = dropped
    if config.score != "variance":
        initial = layer.error(_only(layer.aim, columns(by_variance(*problem), size)))
    return [
        LayerReport(
            full,
            (matrix.shape[0], len(left)),
            1 - keep / units,
            initial,
            dropped,
            layer.error(new),
            config.score,
            "least squares",
            {"variance": initial, config.score: dropped, **judged},
            tuple(block.full(n) for n in (*producers, name)),
        )
    ]


def _judged(block: OpenBlock, weight: torch.Tensor, config: Shrink) -> dict[str, float]:
    names = (block.where.ffn_in[0], block.where.ffn_out)
    fit, held_out = (Tokens(*pair) for pair in block.tokens(names, _JUDGED_TOKENS))
    active = round(config.keep * config.experts)
    return judge(weight, fit, held_out, experts=config.experts, active=active)


def _only(weight: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
    masked = torch.zeros_like(weight)
    masked[:, left] = weight[:, left]
    return masked


def _grain(config: Shrink) -> int:
    return config.multiple if config.part == "neurons" else 1
