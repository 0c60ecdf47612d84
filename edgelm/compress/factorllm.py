"""FactorLLM (Zhao et al. 2024, arXiv 2408.11855): split trained networks, route tokens, adapt.

The inner neurons of a feed-forward network are split into ``experts`` of equal size, weights unchanged. A linear
router sends each token to ``active`` of them; what these give is scaled by N/k. The routers learn by the
Prior-Approximate loss which experts come nearest to the dense network, and the experts adapt with them, by the
language model's own loss or by distillation; everything else is frozen.

Deviations from the public code, which are mistakes in it: the Prior-Approximate loss is part of the loss, so
routers do learn; its labels come from the inputs that the dense network really has; the N/k scale is no
integer division; a permutation moves a neuron's gate, up and down weights together. The projection's
bias belongs to no expert and is not scaled. Texts of any length; gradients are clipped after they are
taken. Shapes: T tokens, F neurons, E experts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from edgelm import layers
from edgelm.compress import sequential
from edgelm.compress.routing import contiguous, expert_outputs
from edgelm.errors import CompressionError, ConfigError
from edgelm.experts import RoutedNetwork, top

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelm.calibration import Batch

# The authors' weights of the two terms beside the task's loss.
PRIOR, BALANCE = 0.05, 0.01


@dataclass(frozen=True)
class FactorLLM:
    """How to factorize and adapt.

    Attributes:
        experts: N, a divisor of the networks' widths.
        active: k, how many a token uses; N gives the dense model.
        split: ``contiguous``, or ``permuted`` at random before that.
        objective: Loss of the adaptation beside the Prior-Approximate loss: ``lm`` (the
            next token's cross entropy), ``distillation`` (of the dense model's last hidden
            states), or ``router``: only the routers learn, by the latter loss alone.
        steps: Batches of about 1,000 tokens.
        rate: Learning rate: warmed up over a twentieth of the steps, then a cosine to 0.
            The authors' is 4e-5, for 10,000 steps.
        router_rate: The same of the routers.
        seed: Of the permutation, the routers' first weights and the order of batches.
    """

    version: ClassVar[int] = 1

    experts: int = 8
    active: int = 4
    split: Literal["contiguous", "permuted"] = "contiguous"
    objective: Literal["distillation", "lm", "router"] = "distillation"
    steps: int = 300
    rate: float = 1e-4
    router_rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        if not 0 < self.active <= self.experts:
            raise ConfigError(
                f"{self.active} of {self.experts} experts cannot be active. Choose from 1 to {self.experts}."
            )
        if self.steps < 0:
            raise ConfigError(
                f"The 'steps' parameter of FactorLLM must not be negative. Got {self.steps} instead."
            )


def permuted(neurons: int, experts: int, seed: int) -> torch.Tensor:
    """The split of the paper after a random permutation, int64 ``[E, F / E]``."""
    order = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    return order[contiguous(neurons, experts)]


def prior_labels(outputs: torch.Tensor, active: int) -> torch.Tensor:
    """FactorLLM's labels: the experts that alone are nearest to the scaled dense output.

    Args:
        outputs: ``[T, E, out]``, of a dense network on its own inputs.
        active: k.

    Returns:
        float32 ``[T, E]``, 1 for the k experts of least ``mean (y_e - y / (N / k))^2``. The
        bias of the projection is outside the experts here and in ``y``.
    """
    scale = outputs.shape[1] / active
    wanted = outputs.sum(dim=1, keepdim=True) / scale
    return top((wanted - outputs).square().mean(dim=2).neg(), active)


def prior_approximate_loss(
    logits: torch.Tensor, labels: torch.Tensor, balance: float = 0.2
) -> torch.Tensor:
    """FactorLLM's loss of a router: ``KL(p || q)`` and its balance term, a scalar.

    Args:
        logits: Of the router, ``[T, E]``; p is their softmax.
        labels: ``[T, E]`` of `prior_labels`; q is the softmax of these ones and zeros, as
            published.
        balance: Weight of ``mean(mask * p)``: the authors' 0.01 over their 0.05.
    """
    low = 1e-7
    p = logits.softmax(dim=1).clamp(low, 1 - low)
    q = labels.softmax(dim=1)
    near = (p * (p / q).log()).sum(dim=1).mean()
    return near + balance * (top(logits, int(labels[0].sum())) * p).mean()


def trained_router(
    x: torch.Tensor, labels: torch.Tensor, steps: int, rate: float = 1e-3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """FactorLLM's router: Adam on the Prior-Approximate loss.

    Args:
        x: Inputs of the dense network, ``[T, in]``: the public code feeds each layer the
            one before's bare output, which the network never sees.
        labels: ``[T, E]`` of `prior_labels`.
        steps: Steps of 512 tokens.
        rate: Learning rate, decayed to 0 by a cosine.
        seed: Of the first weights and the order of tokens.

    Returns:
        Weight ``[E, in]`` and bias ``[E]``.
    """
    made = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(x.shape[1])
    with torch.enable_grad():
        weight, bias = (
            ((torch.rand(shape, generator=made) * 2 - 1) * bound).to(x).requires_grad_()
            for shape in ((labels.shape[1], x.shape[1]), (labels.shape[1],))
        )
        adam = torch.optim.Adam([weight, bias], lr=rate, betas=(0.9, 0.95))
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(512, len(x)),), generator=made).to(
                x.device
            )
            loss = prior_approximate_loss(x[rows] @ weight.T + bias, labels[rows])
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            decay.step()
    return weight.detach(), bias.detach()


def factorize_(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    config: FactorLLM,
    progress: Callable[[int], None] = lambda done: None,
) -> list[RoutedNetwork]:
    """Factorize a model's feed-forward networks in place and adapt them.

    Args:
        model: In float32 and evaluation mode, on the device to work on; held whole, and
            beside it a dense copy.
        batches: Calibration tokens.
        config: How.
        progress: Called after each step with how many are done.

    Returns:
        The routed networks, in the order of the blocks.

    Raises:
        CompressionError: The experts do not divide the width, there are too few tokens for
            them, or the model cannot give the loss.
    """
    where = layers.of_config(model.config)
    blocks = [block for _, block in layers.blocks(model)]
    tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
    dense = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(config.seed)
    routed = []
    for number, block in enumerate(blocks):
        w2 = layers.weight_matrix(block.get_submodule(where.ffn_out))
        neurons = w2.shape[1]
        split = (
            permuted(neurons, config.experts, config.seed + number)
            if config.split == "permuted"
            else contiguous(neurons, config.experts)
        )
        if tokens < 4 * split.shape[1]:
            raise CompressionError(
                f"There are {tokens} tokens for experts of {split.shape[1]} neurons; "
                f"at least {4 * split.shape[1]} are needed. Give more calibration text."
            )
        entry = layers.weight_matrix(block.get_submodule(where.ffn_in[0]))
        router = nn.Linear(entry.shape[1], config.experts).to(w2.device)
        network = RoutedNetwork(router, split, config.active)
        network.attach_(block, where)
        routed.append(network)
    if config.active < config.experts and config.steps:
        with torch.enable_grad():
            _adapt_(model, dense, routed, batches, where, config, progress)
    model.requires_grad_(False)
    for network in routed:
        network.router.requires_grad_(False)
    return routed


def _adapt_(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    routed: Sequence[RoutedNetwork],
    batches: Sequence[Batch],
    where: layers.Architecture,
    config: FactorLLM,
    progress: Callable[[int], None],
) -> None:
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if config.objective == "lm" and head is None:
        raise CompressionError(
            "The objective 'lm' needs a language model with its head. Use 'distillation'."
        )
    blocks, before = ([b for _, b in layers.blocks(m)] for m in (model, dense))
    model.requires_grad_(False)
    adapted = [
        parameter.requires_grad_()
        for block in (blocks if config.objective != "router" else [])
        for name in (*where.ffn_in, where.ffn_out)
        for parameter in block.get_submodule(name).parameters()
    ]
    routers = [p for network in routed for p in network.router.parameters()]
    groups = [
        {"params": routers, "lr": config.router_rate},
        {"params": adapted, "lr": config.rate},
    ]
    adam = torch.optim.Adam(groups, betas=(0.9, 0.95), weight_decay=1e-5)
    warm = max(1, config.steps // 20)

    def pace(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (config.steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(adam, pace)
    parts = [piece for batch in batches for piece in _pieces(batch)]
    made = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    seen: list[dict[str, torch.Tensor]] = [{} for _ in before]
    for kept, block in zip(seen, before, strict=True):
        for key, name in (("x", where.ffn_in[0]), ("a", where.ffn_out)):
            block.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kept=kept, key=key: kept.__setitem__(
                    key, args[0].flatten(0, -2)
                )
            )
    for done in range(config.steps):
        order = order or torch.randperm(len(parts), generator=made).tolist()
        batch = parts[order.pop()]
        real = batch.attention_mask.bool().to(routers[0].device)
        with torch.no_grad():
            wanted = last_hidden(dense, batch)
        loss = torch.zeros((), device=real.device)
        if config.objective == "lm":
            labels = batch.input_ids.to(real.device).masked_fill(~real, -100)
            loss = sequential.call(model, batch, real.device, labels=labels).loss
        elif config.objective == "distillation":
            given, due = last_hidden(model, batch)[real], wanted[real]
            loss = (given - due).square().mean() / due.var().clamp(min=1e-12)
        for network, block, kept in zip(routed, before, seen, strict=True):
            x, a = (kept[key][real.flatten()] for key in ("x", "a"))
            w2 = layers.weight_matrix(block.get_submodule(where.ffn_out))
            best = prior_labels(expert_outputs(a, w2, network.split), config.active)
            near = prior_approximate_loss(network.router(x), best, BALANCE / PRIOR)
            loss = loss + PRIOR * near
        adam.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([*routers, *adapted], 1.0)
        adam.step()
        schedule.step()
        progress(done + 1)


def _pieces(batch: Batch, tokens: int = 1024) -> list[Batch]:
    """A batch in parts of about so many tokens."""
    rows = max(1, tokens // batch.input_ids.shape[1])
    types = batch.token_type_ids
    return [
        type(batch)(
            batch.input_ids[i : i + rows],
            batch.attention_mask[i : i + rows],
            None if types is None else types[i : i + rows],
        )
        for i in range(0, len(batch.input_ids), rows)
    ]


def last_hidden(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Last hidden states, ``[batch, sequence, width]``."""
    device = next(model.parameters()).device
    output = sequential.call(model.base_model, batch, device)
    hidden: torch.Tensor = output.last_hidden_state
    return hidden
