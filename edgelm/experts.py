"""What a checkpoint's experts make of its dense model: those of a domain, or routed ones.

A checkpoint is an ordinary dense model in any case. Of experts by domain one replaces the
general one when the model is loaded. Routed experts (FactorLLM) are runs of the feed-forward networks'
neurons, side by side; a router for each network chooses a token's experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from edgelm import layers, widths
from edgelm.errors import ModelError
from edgelm.models import EXPERTS, ROUTERS
from edgelm.streaming import set_parameters_

NO_DOMAINS = (
    "{} has no experts by domain. "
    "Make some: edgelm compress MODEL -o CKPT --ffn-keep 0.5 --calibration NAME=FILE."
)
_FORMAT = {"format": "edgelm-routers", "version": "1"}


def use_domain_(
    model: Any, folder: Path, known: Sequence[str], domain: str, reference: str
) -> None:
    """Put a domain's experts where the general ones are, in place.

    Args:
        model: Of the checkpoint.
        folder: The checkpoint.
        known: The domains that it has.
        domain: Whose experts.
        reference: What the model is called.

    Raises:
        ModelError: There is no such domain.
    """
    if not known:
        raise ModelError(NO_DOMAINS.format(reference))
    if domain not in known:
        raise ModelError(
            f"{reference} has no expert for the domain '{domain}'. It has: {', '.join(known)}."
        )
    where = layers.of_config(model.config)
    stored = load_file(folder / EXPERTS)
    for path, block in layers.blocks(model):
        prefix = f"{domain}/{path}."
        expert = {
            name.removeprefix(prefix): tensor
            for name, tensor in stored.items()
            if name.startswith(prefix)
        }
        weights = {name: p.detach() for name, p in block.named_parameters()}
        set_parameters_(block, widths.with_expert(weights, expert, where))


@dataclass
class RoutedNetwork:
    """A feed-forward network whose tokens go to some of its neurons only.

    Attributes:
        router: ``Linear(in, experts)``.
        split: Neurons of each expert, int64 ``[E, F / E]``.
        active: k.
        mask: Of the last call, ``[..., E]``.
    """

    router: nn.Linear
    split: torch.Tensor
    active: int
    mask: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _hooks: list[Any] = field(default_factory=list, repr=False)

    def attach_(self, block: nn.Module, where: layers.Architecture) -> None:
        """From now on the block's network is routed.

        All experts are computed and those that are off multiplied by zero: this is
        for training and measuring, not for speed.
        """
        experts, size = self.split.shape
        owner = torch.empty(experts * size, dtype=torch.long)
        owner[self.split.flatten()] = torch.arange(experts).repeat_interleave(size)

        def choose(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].detach().flatten(0, -2).float()
            chosen = top(self.router(x), self.active)
            self.mask = chosen.reshape(*args[0].shape[:-1], experts)

        def keep(
            module: nn.Module, args: tuple[torch.Tensor, ...]
        ) -> tuple[torch.Tensor, ...]:
            scale = self.split.shape[0] / self.active
            on = self.mask[..., owner.to(args[0].device)] * scale
            return (args[0] * on.reshape(args[0].shape).to(args[0].dtype), *args[1:])

        entry, out = where.ffn_in[0], where.ffn_out
        self._hooks += [
            block.get_submodule(entry).register_forward_pre_hook(choose),
            block.get_submodule(out).register_forward_pre_hook(keep),
        ]

    def detach_(self) -> None:
        """From now on it is dense again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


@dataclass(frozen=True)
class Routing:
    """Routed experts of a whole model, as FactorLLM's.

    Attributes:
        networks: By name of the block; each expert's neurons stand side by side.
        errors: Share of the variance of the last hidden states that is lost on held-out text:
            ``routed``, and ``static``, by a model without routers whose networks are as wide
            as what is active.
    """

    networks: Mapping[str, RoutedNetwork]
    errors: Mapping[str, float]

    @property
    def experts(self) -> int:
        """N."""
        return len(next(iter(self.networks.values())).split)

    @property
    def active(self) -> int:
        """k: how many of them a token uses."""
        return next(iter(self.networks.values())).active

    def attach_(self, model: Any) -> None:
        """Route a model's feed-forward networks."""
        where = layers.of_config(model.config)
        for path, block in layers.blocks(model):
            self.networks[path].attach_(block, where)

    @contextmanager
    def detached(self, model: Any) -> Iterator[None]:
        """The same model with all experts for all tokens: the dense one that is stored."""
        for network in self.networks.values():
            network.detach_()
        try:
            yield
        finally:
            self.attach_(model)

    def describe(self) -> dict[str, Any]:
        """What a checkpoint's `edgelm.json` says under ``routing``."""
        errors = dict(self.errors)
        return {"experts": self.experts, "active": self.active, "errors": errors}

    def save(self, folder: Path) -> None:
        """Write the routers into a checkpoint."""
        tensors = {
            f"{path}.{name}": p.detach().cpu().contiguous()
            for path, network in self.networks.items()
            for name, p in network.router.named_parameters()
        }
        save_file(tensors, folder / ROUTERS, _FORMAT)


def load_routing_(
    model: Any, folder: Path, about: Mapping[str, Any], reference: str
) -> Routing:
    """Read a checkpoint's routers and route its model, in place.

    Args:
        model: Of the checkpoint, without padding.
        folder: The checkpoint.
        about: What its `edgelm.json` says under ``routing``.
        reference: What the model is called.

    Raises:
        ModelError: The routers are missing or do not fit the model.
    """
    where, networks = layers.of_config(model.config), {}
    try:
        stored = load_file(folder / ROUTERS)
        experts, active = int(about["experts"]), int(about["active"])
        errors = {way: float(about["errors"][way]) for way in ("routed", "static")}
        for path, block in layers.blocks(model):
            width = widths.of_block(model.config, block, "neurons")
            entry = layers.weight_matrix(block.get_submodule(where.ffn_in[0]))
            router = nn.Linear(entry.shape[1], experts)
            router.load_state_dict(
                {k: stored[f"{path}.{k}"] for k in ("weight", "bias")}
            )
            split = torch.arange(width).reshape(experts, -1)
            networks[path] = RoutedNetwork(router.requires_grad_(False), split, active)
    except (
        *(OSError, KeyError, TypeError, ValueError, RuntimeError),
        SafetensorError,
    ) as error:
        raise ModelError(
            f"The routers of {reference} ({ROUTERS}) do not fit its model: {error}. Make the checkpoint again."
        ) from error
    routing = Routing(networks, errors)
    routing.attach_(model)
    return routing


def top(scores: torch.Tensor, active: int) -> torch.Tensor:
    """Ones at the ``active`` largest of each row, ``[T, E]``."""
    found = torch.zeros_like(scores)
    return found.scatter_(1, scores.topk(active, dim=1).indices, 1.0)
