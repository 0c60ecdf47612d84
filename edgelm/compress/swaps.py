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

from edgelm.compress.patterns import Pattern, row_chunks
from edgelm.errors import ConfigError

SHORTLIST = 16
# Stands for infinity, but times zero is zero.
_LARGE = 1e30


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
    new = keep.clone()
    if bool(keep.all()):
        return new
    for rows in row_chunks(weight):
        new[rows] = _refine_rows(
            weight[rows], keep[rows].clone(), gram, pattern, config
        )
    return new


def _refine_rows(
    w: torch.Tensor,
    keep: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
    config: Swaps,
) -> torch.Tensor:
    choose = _best_in_groups if pattern.group else _best_of_shortlist
    kept = keep.to(w.dtype)
    pruned = w * (1 - kept)
    c = pruned @ gram
    error = (pruned * c).sum(dim=1)
    own = w.square() * gram.diagonal()
    rows = torch.arange(len(w), device=w.device)  # those still being worked on
    for _ in range(config.max_swaps):
        slope = 2 * w * c
        prune_cost = own + slope + _LARGE * (1 - kept)
        grow_cost = own - slope + _LARGE * kept
        p, g, change = choose(w, prune_cost, grow_cost, gram, pattern)
        better = change < -config.min_gain * error
        if not bool(better.all()):
            rows, p, g, change = rows[better], p[better], g[better], change[better]
            w, c, own, kept, error = (t[better] for t in (w, c, own, kept, error))
        if not len(rows):
            break
        keep[rows, p], keep[rows, g] = False, True
        p, g = p.unsqueeze(1), g.unsqueeze(1)
        kept.scatter_(1, p, 0.0).scatter_(1, g, 1.0)
        c = c + w.gather(1, p) * gram[p[:, 0]] - w.gather(1, g) * gram[g[:, 0]]
        error = error + change
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
    shape = (rows, width // m, m)
    wg, a, b = (t.reshape(shape) for t in (w, prune_cost, grow_cost))
    blocks = gram.reshape(width // m, m, width // m, m).diagonal(dim1=0, dim2=2)
    pairs = [(i, j) for i in range(m) for j in range(m) if i != j]
    changes = [
        a[..., i] + b[..., j] - 2 * blocks[i, j] * wg[..., i] * wg[..., j]
        for i, j in pairs
    ]
    best, which = torch.stack(changes).min(dim=0)
    value, group = best.min(dim=1)
    pair = which.gather(1, group.unsqueeze(1)).squeeze(1)
    first, second = torch.tensor(pairs, device=w.device).T
    return group * m + first[pair], group * m + second[pair], value
