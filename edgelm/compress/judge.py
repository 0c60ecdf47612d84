"""Whether routing pays: one feed-forward network, static and routed, at equal active width.

Routing saves no memory and costs dispatch, so it has to leave a clearly smaller error than a
static network of the width that is active (`edgelm.reports.compression.pays`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from edgelm.compress import factorllm, least_squares, obs, routing
from edgelm.errors import CompressionError

_ROUTER_STEPS = 500


@dataclass(frozen=True)
class Tokens:
    """What goes through a network for some tokens.

    Attributes:
        x: Its inputs, ``[T, in]``.
        a: Inputs of its projection, ``[T, F]``.
    """

    x: torch.Tensor
    a: torch.Tensor


def judge(
    w2: torch.Tensor,
    fit: Tokens,
    held_out: Tokens,
    *,
    experts: int,
    active: int,
    shared: int | None = None,
) -> dict[str, float]:
    """Errors of a network made smaller in several ways, all with as many active neurons.

    Args:
        w2: The projection, ``[out, F]``; its bias does not matter.
        fit: Tokens to compute with.
        held_out: Tokens to judge by.
        experts: N.
        active: k of them are used by a token.
        shared: How many of these are always on, in the closed forms; by default half.

    Returns:
        ``E|y' - y|^2 / E|y - E y|^2`` on the held-out tokens: ``static`` (neurons removed, the
        rest solved for), ``oracle`` (the best experts of each token, known; closed-form
        experts and refit), ``closed form`` (a linear router in its place, the better of
        ridge and logistic on the tokens to compute with) and ``FactorLLM`` (contiguous
        experts, its router, N/k).

    Raises:
        CompressionError: The experts do not divide the neurons, more are active than there
            are, or there are too few tokens for their number.
    """
    neurons = w2.shape[1]
    if not 0 < active <= experts:
        raise CompressionError(
            f"{active} of {experts} experts cannot be active. Choose from 1 to {experts}."
        )
    always = active // 2 if shared is None else shared
    plain = routing.contiguous(neurons, experts)
    if len(fit.a) < 4 * plain.shape[1]:
        raise CompressionError(
            f"There are {len(fit.a)} tokens for experts of {plain.shape[1]} neurons; "
            f"at least {4 * plain.shape[1]} are needed. Give more calibration text."
        )
    wanted, due = fit.a @ w2.T, held_out.a @ w2.T
    energy = max(float((due - due.mean(dim=0)).square().sum()), 1e-30)

    def error(given: torch.Tensor) -> float:
        return float((given - due).square().sum()) / energy

    mean = fit.a.mean(dim=0)
    gram = (fit.a - mean).T @ (fit.a - mean) / len(fit.a)
    left = obs.remove_units(w2, gram, 1, active * plain.shape[1])[0]
    static = least_squares.refit(w2, gram, left)
    errors = {"static": error(held_out.a @ static.T + (w2 - static) @ mean)}

    split = routing.clustered(fit.a, w2, experts, always)
    outputs, seen = (routing.expert_outputs(t.a, w2, split) for t in (fit, held_out))
    labels, gain = _labels(outputs, active, always)
    owner = torch.empty(neurons, dtype=torch.long)
    owner[split.flatten()] = torch.arange(experts).repeat_interleave(split.shape[1])

    def refitted(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return routing.refit(fit.a, mask, wanted, w2, split, outputs.mean(dim=0))

    def apply(
        made: tuple[torch.Tensor, ...], t: Tokens, mask: torch.Tensor
    ) -> torch.Tensor:
        weight, offsets, shift = made
        return (t.a * mask[:, owner]) @ weight.T + mask @ offsets + shift

    errors["oracle"] = error(
        apply(refitted(labels), held_out, _labels(seen, active, always)[0])
    )
    found = []
    for weight, bias in (
        routing.ridge_router(fit.x, gain),
        routing.logistic_router(fit.x, labels),
    ):
        bias[:always] = 1e9  # always on
        mask, other = (
            routing.route(t.x, (weight, bias), active) for t in (fit, held_out)
        )
        made = refitted(mask)
        own = float((apply(made, fit, mask) - wanted).square().sum())
        found.append((own, error(apply(made, held_out, other))))
    errors["closed form"] = min(found)[1]

    first = factorllm.prior_labels(routing.expert_outputs(fit.a, w2, plain), active)
    router = factorllm.trained_router(fit.x, first, _ROUTER_STEPS)
    mask = routing.route(held_out.x, router, active)
    on = held_out.a * mask.repeat_interleave(plain.shape[1], dim=1)
    errors["FactorLLM"] = error(on @ w2.T * (experts / active))
    return errors


def _labels(
    outputs: torch.Tensor, active: int, always: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Oracle labels and gains where the first experts are always on."""
    labels, gain = routing.oracle_labels(outputs[:, always:], active - always)
    ones = torch.ones(len(outputs), always, device=outputs.device)
    return torch.cat([ones, labels], dim=1), torch.cat([ones * 0, gain], dim=1)
