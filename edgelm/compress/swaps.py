"""Exact swaps: better masks by the layer's true output error.

In the manner of SparseSwaps (arXiv 2512.10922). With G the Gram matrix of the inputs and u the
pruned weights of a row (zero elsewhere) the row's error is ``u^T G u``. With ``c = G u``,
pruning p and growing g changes it by

    (2 w_p c_p + w_p^2 G_pp) + (w_g^2 G_gg - 2 w_g c_g) - 2 w_p w_g G_pg

and c by ``w_p G_p - w_g G_g``. Only swaps that lower the error are made, so the error
falls with each. DSnoT's objective is this one with ``G = mean mean^T``.

Deliberate deviation: a row does not look at all pairs, but at those of the best
`SHORTLIST` prunings and growings by their own brackets; N:M looks at every pair
within every group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgelm.compress.patterns import Pattern
from edgelm.errors import ConfigError

SHORTLIST = 16
# Rows at a time: bounds the memory of what is gathered per row.
_ROWS = 512


@dataclass(frozen=True)
class Swaps:
    """Parameters of the swaps.

    Attributes:
        max_swaps: Most swaps a row can make.
        min_gain: Stop a row once a swap lowers its error by less than this share.
    """

    max_swaps: int = 100
    min_gain: float = 1e-5

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, low in (("max_swaps", 1), ("min_gain", 0)):
            value = getattr(self, name)
            if not value >= low:
                raise ConfigError(
                    f"The '{name}' parameter of Swaps must be at least {low}. Got {value} instead."
                )


def refine(
    weight: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
    config: Swaps,
) -> torch.Tensor:
    """Swap weights of a mask while that lowers the output error.

    Args:
        weight: ``[out, in]`` float32.
        keep: The mask to start from, bool ``[out, in]``.
        gram: ``E[x x^T]``, or the covariance where a bias takes up the mean; ``[in, in]``.
        pattern: The mask's pattern, which the result has too.
        config: Parameters.

    Returns:
        bool ``[out, in]``. No row's error is larger than before.
    """
    parts = [
        _refine_rows(
            weight[i : i + _ROWS], keep[i : i + _ROWS].clone(), gram, pattern, config
        )
        for i in range(0, len(weight), _ROWS)
    ]
    return torch.cat(parts) if parts else keep


def _refine_rows(
    w: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
    config: Swaps,
) -> torch.Tensor:
    diagonal = gram.diagonal()
    pruned = w.masked_fill(keep, 0.0)
    c = pruned @ gram
    error = (pruned * c).sum(dim=1)
    active = torch.arange(len(w), device=w.device)
    for _ in range(config.max_swaps):
        ws, cs, ks = w[active], c[active], keep[active]
        own = ws.square() * diagonal
        prune_cost = (own + 2 * ws * cs).masked_fill(~ks, torch.inf)
        grow_cost = (own - 2 * ws * cs).masked_fill(ks, torch.inf)
        choose = _best_in_groups if pattern.group else _best_of_shortlist
        p, g, change = choose(ws, prune_cost, grow_cost, gram, pattern)
        better = change < -config.min_gain * error[active]
        if not bool(better.any()):
            break
        rows, p, g = active[better], p[better], g[better]
        keep[rows, p], keep[rows, g] = False, True
        wp, wg = w[rows, p].unsqueeze(1), w[rows, g].unsqueeze(1)
        c[rows] += wp * gram[p] - wg * gram[g]
        error[rows] += change[better]
        active = rows
    return keep


def _best_of_shortlist(
    w: torch.Tensor,
    prune_cost: torch.Tensor,
    grow_cost: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row the best pair among the cheapest prunings and growings."""
    count = min(SHORTLIST, w.shape[1])
    a, p = prune_cost.topk(count, dim=1, largest=False)
    b, g = grow_cost.topk(count, dim=1, largest=False)
    cross = gram[p.unsqueeze(2), g.unsqueeze(1)]
    cross = cross * w.gather(1, p).unsqueeze(2) * w.gather(1, g).unsqueeze(1)
    change = a.unsqueeze(2) + b.unsqueeze(1) - 2 * cross
    best, where = change.flatten(1).min(dim=1)
    take = where.unsqueeze(1)
    return (
        p.gather(1, take // count).squeeze(1),
        g.gather(1, take % count).squeeze(1),
        best,
    )


def _best_in_groups(
    w: torch.Tensor,
    prune_cost: torch.Tensor,
    grow_cost: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each row the best pair within any group."""
    rows, width = w.shape
    m = pattern.group
    groups = width // m
    blocks = (
        gram.reshape(groups, m, groups, m).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    )
    wg = w.reshape(rows, groups, m)
    cross = blocks * wg.unsqueeze(3) * wg.unsqueeze(2)
    change = (
        prune_cost.reshape(rows, groups, m, 1)
        + grow_cost.reshape(rows, groups, 1, m)
        - 2 * cross
    )
    best, where = change.flatten(1).min(dim=1)
    group, pair = where // (m * m), where % (m * m)
    return group * m + pair // m, group * m + pair % m, best
