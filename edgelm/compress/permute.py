"""Channel permutation: groups of N:M that lose less, at no cost when running.

The inner channels of a feed-forward network can be put in any order, if the layer before
and the layer behind agree on it. An order that deals large and small channels evenly to
the groups lets N:M keep more (Zhang et al., "Plug-and-Play", ICLR 2024: sort the channels
by saliency and deal them to and fro; then exchange channels by linear assignment).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from edgelm.compress.patterns import Pattern, make_mask
from edgelm.errors import require
from edgelm.layers import weight_matrix

_ROUNDS = 2


def reorder_(
    producers: Sequence[nn.Module], consumer: nn.Module, order: torch.Tensor
) -> None:
    """Bring the channels between layers into an order, in place; the model computes the same.

    Args:
        producers: The layers before: their outputs are the channels, or (gate and up in
            one layer) a whole number of runs of them.
        consumer: The layer behind.
        order: int64 ``[channels]``: position i takes channel ``order[i]``.
    """
    matrix = weight_matrix(consumer)
    matrix.copy_(matrix[:, order])
    for layer in producers:
        matrix = weight_matrix(layer)
        runs = len(matrix) // len(order)
        rows = torch.cat([order + i * len(order) for i in range(runs)])
        matrix.copy_(matrix[rows])
        bias = getattr(layer, "bias", None)
        if bias is not None:
            bias.copy_(bias[rows])


def best_order(saliency: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """An order of the inputs under which N:M keeps more saliency.

    Args:
        saliency: ``[out, in]``, non-negative.
        pattern: N:M; the width divides.

    Returns:
        int64 ``[in]``: position i of the new order takes input ``order[i]``. Never
        worse than the order that is.
    """
    width, m = saliency.shape[1], pattern.group
    groups = width // m
    ranked = (
        saliency.sum(dim=0).argsort(descending=True, stable=True).reshape(m, groups)
    )
    ranked[1::2] = ranked[1::2].flip(1)
    order = ranked.T.reshape(-1)
    for _ in range(_ROUNDS):
        for lane in range(m):
            order = _reassign(saliency, order, lane, pattern)
    same = torch.arange(width, device=saliency.device)
    gained = _kept(saliency[:, order], pattern) > _kept(saliency, pattern)
    return order if bool(gained) else same


def _kept(saliency: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return (saliency * make_mask(saliency, pattern)).sum()


def _reassign(
    saliency: torch.Tensor, order: torch.Tensor, lane: int, pattern: Pattern
) -> torch.Tensor:
    """Take one channel of every group and give them back by linear assignment."""
    assign = require("scipy.optimize", "compress").linear_sum_assignment
    m = pattern.group
    table = order.reshape(-1, m).clone()
    rest = [i for i in range(m) if i != lane]
    free = table[:, lane]
    others = saliency[:, table[:, rest]]  # [out, groups, m - 1]
    top = others.sort(dim=-1, descending=True).values
    kept = top[..., : pattern.n_keep - 1].sum(dim=-1)
    # The last place kept goes to the larger of the newcomer and the best one left.
    if pattern.n_keep <= m - 1:
        last = top[..., pattern.n_keep - 1]
        gain = torch.stack(
            [
                (kept + torch.maximum(last, saliency[:, [c]])).sum(dim=0)
                for c in free.tolist()
            ]
        )
    else:
        gain = (kept.sum(dim=0) + saliency[:, free].sum(dim=0).unsqueeze(1)).clone()
    rows, columns = assign(gain.double().cpu().numpy(), maximize=True)
    new = free[torch.as_tensor(rows, device=order.device)]
    table[torch.as_tensor(columns, device=order.device), lane] = new
    return table.reshape(-1)
