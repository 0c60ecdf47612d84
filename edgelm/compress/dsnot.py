"""DSnoT: prune and grow weights of a mask without training.

Zhang et al., "Dynamic Sparse No Training", ICLR 2024, arXiv 2310.08915.

A pruned layer's expected output error in row r is ``e_r = sum_{j pruned} W_rj E[x_j]``.
A swap grows one pruned weight and prunes one kept weight of the same row so that e_r
moves towards zero. Grown is the weight of the largest ``W_rj E[x_j] / Var(x_j)^a``
with the sign of e_r; pruned is the least salient (Wanda) of the kept weights whose
loss moves e_r towards zero, or for N:M the least salient of the grown weight's group.

Here everything is per token. The authors' code sums over a sequence of L tokens
instead, so its threshold eps is eps / L here: its default 0.1 at 2048 tokens is 4.9e-5.

Two forms. `refine_faithful` runs the authors' cycles one by one and gives their mask.
`refine_fast` (the default) uses that the order of growing and pruning is fixed while e_r
keeps its sign: all cycles come from one sort and one cumulative sum, and of all
prefixes of that list the first within the threshold is taken, or else the one with
the smallest ``|e_r|``. So it never makes ``|e_r|`` larger.

Deliberate deviations of both from the authors' code: a row stops when nothing is left
to grow or prune (their pointers run on into kept weights, and sparsity drifts); a
feature that never varies and never contributes cannot be grown (their 0 / 0 is).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from edgelm.compress.patterns import Pattern, row_chunks
from edgelm.compress.saliency import wanda
from edgelm.errors import ConfigError
from edgelm.statistics import ActivationStatistics

# Stands for infinity, but times zero is zero.
_LARGE = 1e30


@dataclass(frozen=True)
class Dsnot:
    """Parameters of DSnoT; names as in the paper's code where the unit is the same.

    Attributes:
        max_cycles: Most swaps a row can make (theirs: ``max_cycle_time``).
        update_threshold: A row stops once ``|e_r|`` is at most this, in units of
            the output per token (theirs is per sequence).
        variance_power: The ``a`` of the growing criterion; 0 leaves variance out
            (theirs: ``pow_of_var_regrowing``).
        keep_sign: Stop a row before e_r changes its sign (theirs: not
            ``without_same_sign``); N:M always does.
        mode: ``fast``, or ``faithful``: the authors' cycles one by one.
    """

    max_cycles: int = 50
    update_threshold: float = 0.1 / 2048
    variance_power: float = 1.0
    keep_sign: bool = False
    mode: Literal["fast", "faithful"] = "fast"

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, low in (
            ("max_cycles", 1),
            ("update_threshold", 0),
            ("variance_power", 0),
        ):
            value = getattr(self, name)
            if not value >= low:
                raise ConfigError(
                    f"The '{name}' parameter of Dsnot must be at least {low}. Got {value} instead."
                )


def output_error(
    weight: torch.Tensor, keep: torch.Tensor, statistics: ActivationStatistics
) -> torch.Tensor:
    """Expected output error ``e_r`` of each row, ``[out]``."""
    return (weight * statistics.mean).masked_fill(keep, 0.0).sum(dim=1)


def refine(
    weight: torch.Tensor,
    keep: torch.Tensor,
    saliency: torch.Tensor,
    statistics: ActivationStatistics,
    pattern: Pattern,
    config: Dsnot,
) -> torch.Tensor:
    """Swap weights of a mask so that the expected output error shrinks.

    Args:
        weight: ``[out, in]`` float32.
        keep: The mask to start from, bool ``[out, in]``.
        saliency: What the mask was made from, ``[out, in]``; for N:M it says which
            weight of a group goes.
        statistics: Of the layer's input.
        pattern: The mask's pattern, which the result has too.
        config: Parameters.

    Returns:
        bool ``[out, in]``. In ``fast`` mode no row's ``|e_r|`` is larger than before.
    """
    form = {"fast": refine_fast, "faithful": refine_faithful}[config.mode]
    return form(weight, keep, saliency, statistics, pattern, config)


def refine_fast(
    weight: torch.Tensor,
    keep: torch.Tensor,
    saliency: torch.Tensor,
    statistics: ActivationStatistics,
    pattern: Pattern,
    config: Dsnot,
) -> torch.Tensor:
    """All cycles at once. Arguments and result are those of `refine`."""
    new = torch.empty_like(keep)
    for rows in row_chunks(weight):
        new[rows] = _refine_rows(
            weight[rows], keep[rows], saliency[rows], statistics, pattern, config
        )
    return new


def _refine_rows(
    weight: torch.Tensor,
    keep: torch.Tensor,
    saliency: torch.Tensor,
    statistics: ActivationStatistics,
    pattern: Pattern,
    config: Dsnot,
) -> torch.Tensor:
    # Products with a mask of floats: several times faster on a CPU than masked_fill.
    kept = keep.to(weight.dtype)
    contribution = weight * statistics.mean
    error = (contribution * (1 - kept)).sum(dim=1)
    sign = error.sign().unsqueeze(1)
    cycles = min(config.max_cycles, keep.shape[1])

    growth = weight * _growth_scale(statistics, config) * sign * (1 - kept)
    value, grow = growth.topk(cycles, dim=1)
    valid = value > 0
    if pattern.group:
        prune, paired = _prune_in_group(grow, valid, keep, saliency, pattern)
    else:
        harmless = kept * (contribution * sign < 0).to(weight.dtype)
        cost = wanda(weight, statistics) + _LARGE * (1 - harmless)
        value, prune = cost.topk(cycles, dim=1, largest=False)
        paired = value < _LARGE
    step = contribution.gather(1, prune) - contribution.gather(1, grow)
    # A pair of N:M may point the wrong way; it is passed over. For the rest, both
    # lists end where the valid entries do, so valid pairs come first.
    valid = valid & paired & (step * sign < 0)
    path = error.unsqueeze(1) + step.masked_fill(~valid, 0.0).cumsum(dim=1)
    errors = torch.cat([error.unsqueeze(1), path], dim=1).abs()
    if pattern.group or config.keep_sign:
        crossed = torch.nn.functional.pad(path * sign < 0, (1, 0))
        errors = errors.masked_fill(crossed, torch.inf)
    reached = errors <= config.update_threshold
    best = torch.where(
        reached.any(dim=1), reached.to(torch.int8).argmax(dim=1), errors.argmin(dim=1)
    ).unsqueeze(1)
    taken = valid & (torch.arange(cycles, device=keep.device) < best)
    return _swap(keep, grow, prune, taken)


def refine_faithful(
    weight: torch.Tensor,
    keep: torch.Tensor,
    saliency: torch.Tensor,
    statistics: ActivationStatistics,
    pattern: Pattern,
    config: Dsnot,
) -> torch.Tensor:
    """The authors' cycles, one by one. Arguments and result are those of `refine`."""
    contribution = weight * statistics.mean
    error = contribution.masked_fill(keep, 0.0).sum(dim=1)
    first_sign = error.sign()
    growth = _growth(contribution, statistics, config).masked_fill(keep, 0.0)
    value, order = growth.sort(dim=1, stable=True)
    rows = torch.arange(len(weight), device=weight.device)
    low = torch.zeros_like(rows)
    high = torch.full_like(rows, weight.shape[1] - 1)
    metric = wanda(weight, statistics)
    up = metric.masked_fill(~(keep & (contribution > 0)), torch.inf)
    down = metric.masked_fill(~(keep & (contribution < 0)), torch.inf)
    groups = saliency.masked_fill(~keep, torch.inf)
    keep = keep.clone()
    active = torch.ones_like(rows, dtype=torch.bool)
    for _ in range(config.max_cycles):
        positive = error > 0
        at = torch.where(positive, high, low).clamp(0, weight.shape[1] - 1)
        grow = order[rows, at]
        grown = value[rows, at]
        usable = torch.where(positive, grown > 0, grown < 0) & ~keep[rows, grow]
        high, low = high - positive.long(), low + (~positive).long()
        if pattern.group:
            start = grow // pattern.group * pattern.group
            window = start.unsqueeze(1) + torch.arange(
                pattern.group, device=keep.device
            )
            cost, slot = groups.gather(1, window).min(dim=1)
            prune = start + slot
        else:
            cost, prune = torch.where((error < 0).unsqueeze(1), up, down).min(dim=1)
        after = error + contribution[rows, prune] - contribution[rows, grow]
        active = active & (error.abs() > config.update_threshold)
        # Nothing left to grow ends a row; a group with nothing left to prune is
        # passed over, and the row goes on with the next weight.
        paired = cost < torch.inf
        active = active & usable & (paired | bool(pattern.group))
        if pattern.group or config.keep_sign:
            active = active & (~paired | (after.sign() == first_sign))
        swap = active & paired
        if not bool(active.any()):
            break
        keep[rows[swap], grow[swap]] = True
        keep[rows[swap], prune[swap]] = False
        error = torch.where(swap, after, error)
        for used in (up, down, groups):
            used[rows[swap], prune[swap]] = torch.inf
    return keep


def _growth(
    contribution: torch.Tensor, statistics: ActivationStatistics, config: Dsnot
) -> torch.Tensor:
    """``W E[x] / Var(x)^a``; 0 where a feature contributes nothing."""
    if config.variance_power == 0:
        return contribution
    scale = statistics.within_variance.pow(config.variance_power)
    return torch.where(contribution == 0, 0.0, contribution / scale)


def _growth_scale(statistics: ActivationStatistics, config: Dsnot) -> torch.Tensor:
    """``E[x] / Var(x)^a`` of each feature, finite; 0 for one that is always zero."""
    mean = statistics.mean
    if config.variance_power == 0:
        return mean
    scale = mean / statistics.within_variance.pow(config.variance_power)
    # A constant feature is the best to grow, in the order of its contributions.
    return torch.where(mean == 0, 0.0, scale.clamp(-_LARGE, _LARGE))


def _prune_in_group(
    grow: torch.Tensor,
    valid: torch.Tensor,
    keep: torch.Tensor,
    saliency: torch.Tensor,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each grown weight the kept weight of its group that goes.

    The k-th grown of a group takes its k-th least salient. Returns indices, and where
    there is one.
    """
    rows, m = len(keep), pattern.group
    group = (grow // m).masked_fill(~valid, -1)
    same = group.unsqueeze(2) == group.unsqueeze(1)
    nth = same.tril_(-1).sum(dim=2)
    start = group.clamp(min=0).unsqueeze(2)
    at = start.expand(-1, -1, m)
    cost = saliency.masked_fill(~keep, torch.inf).reshape(rows, -1, m).gather(1, at)
    order = cost.argsort(dim=-1, stable=True)
    slot = order.gather(2, nth.clamp(max=m - 1).unsqueeze(2)).squeeze(2)
    return group.clamp(min=0) * m + slot, valid & (nth < pattern.n_keep)


def _swap(
    keep: torch.Tensor, grow: torch.Tensor, prune: torch.Tensor, taken: torch.Tensor
) -> torch.Tensor:
    """Grow and prune where ``taken``; each weight is in at most one taken swap."""
    change = torch.zeros_like(keep, dtype=torch.int8)
    change.scatter_add_(1, grow, taken.to(torch.int8))
    change.scatter_add_(1, prune, -taken.to(torch.int8))
    return (keep.to(torch.int8) + change).bool()
