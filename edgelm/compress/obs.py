"""Optimal brain surgeon: what removing weights costs, and how the others make up for it.

Frantar and Alistarh, "SparseGPT", 2023, arXiv 2301.00774. With ``G = E[x x^T]`` damped,
and U the upper Cholesky factor of ``G^-1``, column j's weights cost ``w_j^2 / U_jj^2`` once
the columns before it are settled, and the error of pruning one is spread over the columns
behind it along ``U_j,:``.
"""

from __future__ import annotations

import torch

from edgelm.compress.patterns import Pattern, make_mask, pruned_per_row

# Of the mean diagonal, added to it: SparseGPT's default.
DAMPING = 0.01
_BLOCK = 128


def inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """Upper Cholesky factor of `damped_inverse`, float64 ``[in, in]``."""
    factor: torch.Tensor = torch.linalg.cholesky(damped_inverse(gram), upper=True)
    return factor


def damped_inverse(gram: torch.Tensor) -> torch.Tensor:
    """The inverse of a Gram matrix, damped.

    Args:
        gram: ``[in, in]``, symmetric, positive semi-definite; may be singular.

    Returns:
        float64 ``[in, in]``. A feature that is always zero gets the damping alone, so
        its weights cost least.
    """
    matrix = gram.double()
    level = matrix.diagonal().mean()
    damping = DAMPING * level if level > 0 else torch.ones_like(level)
    matrix = matrix + damping * torch.eye(
        len(matrix), dtype=matrix.dtype, device=matrix.device
    )
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def removal_cost(weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """SparseGPT's saliency ``w_j^2 / U_jj^2`` for all columns at once, ``[out, in]``."""
    scale = inverse_factor(gram).diagonal()
    return (weight.double() / scale).square().to(weight.dtype)


def prune(
    weight: torch.Tensor,
    gram: torch.Tensor,
    pattern: Pattern,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """SparseGPT: prune column by column, each error spread over the columns behind.

    Args:
        weight: ``[out, in]``.
        gram: ``[in, in]``.
        pattern: The pattern.
        keep: A mask to follow, bool ``[out, in]``. Without one the mask is chosen on the way:
            unstructured in blocks of 128 columns, N:M group by group.

    Returns:
        The new weight, zero where pruned, and the mask.
    """
    factor = inverse_factor(gram)
    w = weight.double().clone()
    chosen = torch.ones_like(w, dtype=torch.bool) if keep is None else keep
    width = w.shape[1]
    block = (
        _BLOCK if not pattern.group else max(_BLOCK // pattern.group, 1) * pattern.group
    )
    for first in range(0, width, block):
        last = min(first + block, width)
        if keep is None and not pattern.group:
            cost = (w[:, first:last] / factor.diagonal()[first:last]).square()
            # What rounding takes from one block it gives to another.
            count = pruned_per_row(pattern, last) - pruned_per_row(pattern, first)
            chosen[:, first:last].scatter_(
                1, cost.topk(count, largest=False).indices, False
            )
        errors = torch.zeros_like(w[:, first:last])
        for j in range(first, last):
            if keep is None and pattern.group and j % pattern.group == 0:
                group = slice(j, j + pattern.group)
                cost = (w[:, group] / factor.diagonal()[group]).square()
                chosen[:, group] = make_mask(cost, pattern)
            error = w[:, j].masked_fill(chosen[:, j], 0.0) / factor[j, j]
            w[:, j:last] -= torch.outer(error, factor[j, j:last])
            errors[:, j - first] = error
        w[:, last:] -= errors @ factor[first:last, last:]
    return w.masked_fill(~chosen, 0.0).to(weight.dtype), chosen


def remove_units(
    weight: torch.Tensor,
    gram: torch.Tensor,
    size: int,
    keep: int,
    always: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove whole units of inputs, the cheapest first, until few enough are left.

    A unit's cost is what the layer's output loses when it goes and all others make up for
    it: ``tr(W_S ([G^-1]_SS)^-1 W_S^T)``. About 1.5 % of the units go at a time.

    Args:
        weight: ``[out, units * size]``.
        gram: ``[in, in]``.
        size: Inputs of a unit: 1 for a neuron, a head's width.
        keep: How many units stay, at least 1.
        always: int64, units that stay whatever they cost; no more than ``keep``.

    Returns:
        int64 ``[keep]``, the units that stay, in order; float64 ``[units - keep]``, what had
        been lost by when each of the others was gone, as a sum over steps.
    """
    left = torch.arange(weight.shape[1] // size, device=weight.device)
    at_once = max(len(left) // 64, 1)
    w = weight.double().clone()
    inverse = damped_inverse(gram)
    costs, lost = [], 0.0
    while len(left) > keep:
        own = inverse.reshape(len(left), size, len(left), size)
        solved = torch.linalg.inv(own.diagonal(dim1=0, dim2=2).permute(2, 0, 1))
        parts = w.reshape(len(w), len(left), size)
        cost = torch.einsum("oni,nij,onj->n", parts, solved, parts)
        if always is not None:
            cost[torch.isin(left, always)] = torch.inf
        count = min(at_once, len(left) - keep)
        going = torch.zeros(len(left), dtype=torch.bool, device=w.device)
        going[cost.topk(count, largest=False).indices] = True
        gone = going.repeat_interleave(size)
        update = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, ~gone])
        removed = torch.linalg.solve(inverse[gone][:, gone], w[:, gone].T)
        lost += float((w[:, gone].T * removed).sum())
        costs += [lost] * count
        w = w[:, ~gone] - w[:, gone] @ update
        inverse = inverse[~gone][:, ~gone] - inverse[~gone][:, gone] @ update
        left = left[~going]
    return left, torch.tensor(costs, dtype=torch.float64)
