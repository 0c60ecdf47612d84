"""Routing among experts, against loops that say what is meant."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.compress import factorllm, routing
from edgelm.compress.judge import Tokens, judge
from edgelm.errors import CompressionError
from edgelm.reports.compression import pays


def network(
    tokens: int = 60, neurons: int = 24, out: int = 5, width: int = 7
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, GELU activations and a projection."""
    x = torch.randn(tokens, width)
    a = torch.nn.functional.gelu(x @ torch.randn(width, neurons) + torch.randn(neurons))
    return x, a, torch.randn(out, neurons)


def permuted(neurons: int, experts: int) -> torch.Tensor:
    """A split at random."""
    return torch.randperm(neurons)[routing.contiguous(neurons, experts)]


@pytest.mark.parametrize("split", [routing.contiguous, permuted])
def test_a_split_is_a_partition_and_the_experts_sum_to_the_network(
    split: Callable[[int, int], torch.Tensor],
) -> None:
    _, a, w2 = network()
    parts = split(24, 6)
    assert parts.shape == (6, 4)
    assert sorted(parts.flatten().tolist()) == list(range(24))
    whole = routing.expert_outputs(a, w2, parts).sum(dim=1)
    torch.testing.assert_close(whole, a @ w2.T, rtol=1e-5, atol=1e-5)


def test_experts_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(CompressionError, match="5 experts do not divide the 24"):
        routing.contiguous(24, 5)


@settings(max_examples=20, deadline=None)
@given(active=st.integers(1, 3), seed=st.integers(0, 999))
def test_prior_labels_token_by_token(active: int, seed: int) -> None:
    torch.manual_seed(seed)
    _, a, w2 = network(tokens=9)
    outputs = routing.expert_outputs(a, w2, routing.contiguous(24, 4))
    found = factorllm.prior_labels(outputs, active)
    for token, row in zip(outputs, found, strict=True):
        dense = token.sum(dim=0)
        far = [float(((e - dense * active / 4) ** 2).mean()) for e in token]
        due = sorted(range(4), key=far.__getitem__)[:active]
        assert sorted(row.nonzero().flatten().tolist()) == sorted(due)


def test_the_prior_approximate_loss_is_the_published_one() -> None:
    """N = 4, k = 2: the label is 0.3655 on the chosen, 0.1345 on the others."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    p = torch.tensor([1.0, 0.0, -1.0, 2.0]).softmax(0)
    q = torch.tensor([0.3655, 0.1345, 0.1345, 0.3655])
    due = float((p * (p / q).log()).sum()) + 0.2 * float((p[0] + p[3]) / 4)
    found = factorllm.prior_approximate_loss(logits, labels)
    assert float(found) == pytest.approx(due, abs=1e-4)


@settings(max_examples=20, deadline=None)
@given(active=st.integers(1, 4), seed=st.integers(0, 999))
def test_the_oracle_tries_every_set(active: int, seed: int) -> None:
    torch.manual_seed(seed)
    _, a, w2 = network(tokens=12)
    outputs = routing.expert_outputs(a, w2, permuted(24, 4))
    means, dense = outputs.mean(dim=0), outputs.sum(dim=1)
    found, gain = routing.oracle_labels(outputs, active)

    def lost(token: int, keep: tuple[int, ...]) -> float:
        given = sum(outputs[token, e] if e in keep else means[e] for e in range(4))
        return float((given - dense[token]).square().sum())

    for token in range(12):
        best = min(lost(token, s) for s in itertools.combinations(range(4), active))
        kept = tuple(found[token].nonzero().flatten().tolist())
        assert len(kept) == active
        assert lost(token, kept) == pytest.approx(best, rel=1e-3, abs=1e-5)
    centred = outputs - means
    due = torch.einsum("teo,to->te", centred, centred.sum(dim=1))
    torch.testing.assert_close(gain, due, rtol=1e-4, atol=1e-4)


def test_the_greedy_oracle_is_near_the_exact_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, a, w2 = network(tokens=200)
    outputs = routing.expert_outputs(a, w2, routing.contiguous(24, 8))
    exact, _ = routing.oracle_labels(outputs, 4)
    monkeypatch.setattr(routing, "_MOST_SETS", 1)
    greedy, _ = routing.oracle_labels(outputs, 4)
    assert bool((greedy.sum(dim=1) == 4).all())
    centred = outputs - outputs.mean(dim=0)

    def lost(keep: torch.Tensor) -> float:
        return float(torch.einsum("te,teo->to", 1 - keep, centred).square().sum())

    assert lost(exact) <= lost(greedy) <= 1.5 * lost(exact)


def test_clusters_are_balanced_and_find_neurons_that_act_together() -> None:
    """Three groups of neurons, each on for its own tokens; and four that matter always."""
    torch.manual_seed(0)
    kind = torch.randint(3, (300,))
    a = 0.01 * torch.randn(300, 16)
    for group in range(3):
        on = (kind == group).float().unsqueeze(1)
        a[:, 4 + group :: 3][:, :4] += on * torch.randn(300, 4)
    a[:, :4] += 5 * torch.randn(300, 4)
    split = routing.clustered(a, torch.ones(2, 16), 4, shared=1)
    assert sorted(split[0].tolist()) == [0, 1, 2, 3]
    groups = {tuple(sorted(part.tolist())) for part in split[1:]}
    assert groups == {tuple(range(4 + g, 16, 3)) for g in range(3)}


@pytest.mark.parametrize("name", ["ridge", "logistic", "trained"])
def test_routers_learn_a_linear_rule(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 6) + 1
    scores = x @ torch.randn(6, 4)
    labels = routing.top(scores, 2)
    made = {
        "ridge": lambda: routing.ridge_router(x, scores),
        "logistic": lambda: routing.logistic_router(x, labels),
        "trained": lambda: factorllm.trained_router(x, labels, 600, rate=3e-2),
    }[name]()
    agree = float((routing.route(x, made, 2) == labels).float().mean())
    assert agree > (0.98 if name == "ridge" else 0.9)


def test_all_experts_active_is_the_dense_network() -> None:
    """N = k to 1e-5, the refit included."""
    x, a, w2 = network()
    split = permuted(24, 4)
    outputs = routing.expert_outputs(a, w2, split)
    mask = routing.route(x, routing.ridge_router(x, outputs.sum(dim=2)), 4)
    assert bool((mask == 1).all())
    weight, offsets, shift = routing.refit(
        a, mask, a @ w2.T, w2, split, outputs.mean(dim=0)
    )
    given = a @ weight.T + mask @ offsets + shift
    torch.testing.assert_close(given, a @ w2.T, rtol=1e-5, atol=1e-5)


def test_refit_is_never_worse_than_putting_the_mean_in() -> None:
    torch.manual_seed(0)
    _x, a, w2 = network(tokens=400)
    split = routing.contiguous(24, 4)
    outputs = routing.expert_outputs(a, w2, split)
    mask = routing.oracle_labels(outputs, 2)[0]
    wanted, means = a @ w2.T, outputs.mean(dim=0)
    weight, offsets, shift = routing.refit(a, mask, wanted, w2, split, means)
    neurons = torch.arange(24) // 6
    given = (a * mask[:, neurons]) @ weight.T + mask @ offsets + shift
    mean = torch.einsum("te,teo->to", mask, outputs) + (1 - mask) @ means
    assert float((given - wanted).square().sum()) < 0.9 * float(
        (mean - wanted).square().sum()
    )


def tokens_through_a_network(count: int) -> tuple[Tokens, torch.Tensor]:
    torch.manual_seed(0)
    w1, b1, w2 = torch.randn(7, 24), torch.randn(24), torch.randn(5, 24)
    torch.manual_seed(count)
    x = torch.randn(count, 7)
    return Tokens(x, torch.nn.functional.gelu(x @ w1 + b1)), w2


def test_everything_active_loses_nothing() -> None:
    (fit, w2), (held_out, _) = map(tokens_through_a_network, (900, 500))
    errors = judge(w2, fit, held_out, experts=4, active=4)
    assert set(errors) == {"static", "oracle", "closed form", "FactorLLM"}
    assert all(error < 1e-8 for error in errors.values())


def test_routing_pays_where_tokens_are_of_kinds() -> None:
    """Neurons that work for one kind of token only, which a linear router can tell."""

    def made(seed: int) -> tuple[Tokens, torch.Tensor]:
        torch.manual_seed(0)
        w2 = torch.randn(6, 32)
        torch.manual_seed(seed)
        kind = torch.randint(4, (3000,))
        x = torch.nn.functional.one_hot(kind, 4) + 0.05 * torch.randn(3000, 4)
        own = torch.nn.functional.one_hot(kind, 4).repeat_interleave(8, dim=1)
        return Tokens(x, own * torch.randn(3000, 32)), w2

    (fit, w2), (held_out, _) = made(1), made(2)
    errors = judge(w2, fit, held_out, experts=4, active=1, shared=0)
    assert errors["closed form"] < 0.05 < errors["static"]
    assert pays(errors)


@pytest.mark.parametrize(
    ("count", "experts", "active", "message"),
    [
        (900, 4, 5, "5 of 4 experts cannot be active"),
        (900, 5, 2, "do not divide"),
        (20, 4, 2, "at least 24 are needed"),
    ],
)
def test_what_cannot_be_judged(
    count: int, experts: int, active: int, message: str
) -> None:
    tokens, w2 = tokens_through_a_network(count)
    with pytest.raises(CompressionError, match=message):
        judge(w2, tokens, tokens, experts=experts, active=active)
