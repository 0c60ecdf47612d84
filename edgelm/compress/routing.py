"""Routing a feed-forward network among experts: splits, labels, routers, refits; all on tensors.

An expert is a set of the network's inner neurons: ``y = sum_e W2_e a_e + b2`` is exact, whatever
the activation function. FactorLLM's way is in `edgelm.compress.factorllm`; here everything is
closed-form: experts by what their neurons contribute together, labels that are exact, routers and
projections by least squares.

Shapes: T tokens, F neurons, E experts, ``x`` [T, in], ``a`` [T, F], weights ``w2`` [out, F].
"""

from __future__ import annotations

import itertools
import math

import torch

from edgelm.compress import least_squares
from edgelm.errors import CompressionError
from edgelm.experts import top

# Above this many sets of experts the oracle is greedy.
_MOST_SETS = 1000
_CLUSTER_ROUNDS = 8
_SKETCH = 256


def contiguous(neurons: int, experts: int) -> torch.Tensor:
    """FactorLLM's split: expert e has neurons e F/E to (e + 1) F/E, int64 ``[E, F / E]``."""
    if neurons % experts:
        raise CompressionError(
            f"{experts} experts do not divide the {neurons} neurons of a feed-forward network."
        )
    return torch.arange(neurons).reshape(experts, -1)


def clustered(
    a: torch.Tensor, w2: torch.Tensor, experts: int, shared: int, seed: int = 0
) -> torch.Tensor:
    """Experts of neurons that contribute to the same tokens.

    Args:
        a: Activations, ``[T, F]``.
        w2: ``[out, F]``.
        experts: How many, of equal size.
        shared: How many of them come first, of the neurons that contribute most: these
            are to be always on.
        seed: Of the sketch of the tokens and the first centres.

    Returns:
        int64 ``[E, F / E]``. Balanced k-means on ``|a_j - mean| |W2_j|`` over tokens, each
        neuron's standardised and projected to 256 random directions.
    """
    size = contiguous(a.shape[1], experts).shape[1]
    each = (a - a.mean(dim=0)).abs() * w2.norm(dim=0)
    order = each.square().sum(dim=0).argsort(descending=True, stable=True)
    always, rest = order[: shared * size], order[shared * size :]
    parts = [always.reshape(shared, size)]
    if shared < experts:
        made = torch.Generator().manual_seed(seed)
        sketch = torch.randn(len(a), _SKETCH, generator=made).to(a)
        profile = each[:, rest].T - each[:, rest].T.mean(dim=1, keepdim=True)
        points = torch.nn.functional.normalize(profile @ sketch, dim=1)
        own = _balanced_clusters(points, experts - shared, made)
        parts.append(rest[own])
    return torch.cat(parts)


def expert_outputs(
    a: torch.Tensor, w2: torch.Tensor, split: torch.Tensor
) -> torch.Tensor:
    """What each expert adds to the output, ``[T, E, out]``; they sum to ``a W2^T``."""
    return torch.einsum("tef,oef->teo", a[:, split], w2[:, split])


def oracle_labels(
    outputs: torch.Tensor, active: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best experts of each token, if those left out give their mean instead.

    Args:
        outputs: ``[T, E, out]``.
        active: How many stay.

    Returns:
        float32 ``[T, E]``, 1 for the experts that stay; and ``[T, E]``, what each adds: the
        row sums of the token's Gram matrix of centred outputs. Dropping D costs
        ``1_D^T K 1_D``, so every set is tried, or, beyond a thousand, experts go one
        by one.
    """
    centred = outputs - outputs.mean(dim=0)
    gram = centred @ centred.transpose(1, 2)
    experts = outputs.shape[1]
    gain = gram.sum(dim=2)
    if math.comb(experts, active) <= _MOST_SETS:
        sets = list(itertools.combinations(range(experts), experts - active))
        dropped = torch.zeros(len(sets), experts, device=outputs.device)
        for row, members in enumerate(sets):
            dropped[row, list(members)] = 1.0
        cost = torch.einsum("se,tef,sf->ts", dropped, gram, dropped)
        return 1.0 - dropped[cost.argmin(dim=1)], gain
    keep = torch.ones(len(outputs), experts, device=outputs.device)
    for _ in range(experts - active):
        gone = 1.0 - keep
        cost = gram.diagonal(dim1=1, dim2=2) + 2 * (gram @ gone.unsqueeze(2)).squeeze(2)
        first = cost.masked_fill(keep == 0, math.inf).argmin(dim=1, keepdim=True)
        keep.scatter_(1, first, 0.0)
    return keep, gain


def ridge_router(
    x: torch.Tensor, gain: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear router by least squares on what each expert adds.

    Args:
        x: Inputs of the network, ``[T, in]``.
        gain: ``[T, E]`` of `oracle_labels`; what all experts of a token add alike does not
            matter.

    Returns:
        Weight ``[E, in]`` and bias ``[E]``.
    """
    target = gain - gain.mean(dim=1, keepdim=True)
    mean, level = x.mean(dim=0), target.mean(dim=0)
    centred = x - mean
    gram = centred.T @ centred / len(x)
    weight = least_squares.solve(gram, (target - level).T @ centred / len(x))
    return weight, level - weight @ mean


def logistic_router(
    x: torch.Tensor, labels: torch.Tensor, penalty: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear router by logistic regression on the labels of each expert (L-BFGS).

    Args:
        x: Inputs of the network, ``[T, in]``.
        labels: ``[T, E]``, ones and zeros.
        penalty: Of the squared weights, inputs standardised.

    Returns:
        Weight ``[E, in]`` and bias ``[E]``.
    """
    mean, deviation = x.mean(dim=0), x.std(dim=0).clamp(min=1e-6)
    inputs = (x - mean) / deviation
    with torch.enable_grad():
        weight = torch.zeros(
            labels.shape[1], x.shape[1], device=x.device, requires_grad=True
        )
        bias = torch.zeros(labels.shape[1], device=x.device, requires_grad=True)
        fit = torch.optim.LBFGS(
            [weight, bias], max_iter=50, line_search_fn="strong_wolfe"
        )

        def closure() -> torch.Tensor:
            fit.zero_grad()
            logits = inputs @ weight.T + bias
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
            loss = loss + penalty * weight.square().sum()
            torch.autograd.backward(loss)
            return loss

        fit.step(closure)  # type: ignore[no-untyped-call]
    found = weight.detach() / deviation
    return found, bias.detach() - found @ mean


def route(
    x: torch.Tensor, router: tuple[torch.Tensor, torch.Tensor], active: int
) -> torch.Tensor:
    """The experts of each token by a router, ones and zeros, ``[T, E]``."""
    weight, bias = router
    return top(x @ weight.T + bias, active)


def refit(
    a: torch.Tensor,
    mask: torch.Tensor,
    wanted: torch.Tensor,
    w2: torch.Tensor,
    split: torch.Tensor,
    means: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The projection for a fixed routing, by ridge regression.

    Args:
        a: ``[T, F]``.
        mask: ``[T, E]``, ones and zeros.
        wanted: Output without the projection's bias, ``[T, out]``.
        w2: ``[out, F]``; the ridge pulls towards it.
        split: ``[E, F / E]``.
        means: Mean output of each expert, ``[E, out]``.

    Returns:
        The new weight ``[out, F]``; what each expert adds to the bias when it is on,
        ``[E, out]``; and to the bias itself, ``[out]``.
    """
    neurons = torch.empty_like(split[0].new_zeros(a.shape[1]))
    neurons[split.flatten()] = torch.arange(
        len(split), device=split.device
    ).repeat_interleave(split.shape[1])
    z = torch.cat([a * mask[:, neurons], mask, torch.ones_like(mask[:, :1])], dim=1)
    # Where an expert is off, its mean stands in.
    start = torch.cat([w2, -means.T, means.sum(dim=0, keepdim=True).T], dim=1)
    rest = wanted - z @ start.T
    new = start + least_squares.solve(z.T @ z / len(z), rest.T @ z / len(z))
    width = a.shape[1]
    return new[:, :width], new[:, width:-1].T.contiguous(), new[:, -1]


def _balanced_clusters(
    points: torch.Tensor, count: int, made: torch.Generator
) -> torch.Tensor:
    """Clusters of equal size, int64 ``[count, points / count]``; the nearest are placed first."""
    size = len(points) // count
    centres = points[
        torch.randperm(len(points), generator=made)[:count].to(points.device)
    ]
    members = torch.empty(0)
    for _ in range(_CLUSTER_ROUNDS):
        near = points @ centres.T
        room = [size] * count
        own = [-1] * len(points)
        for place in near.flatten().argsort(descending=True).tolist():
            point, cluster = divmod(place, count)
            if own[point] < 0 and room[cluster]:
                own[point] = cluster
                room[cluster] -= 1
        members = torch.tensor(own, device=points.device)
        centres = torch.stack([points[members == c].mean(dim=0) for c in range(count)])
    return torch.stack([(members == c).nonzero().flatten() for c in range(count)])
