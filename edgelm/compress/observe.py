"""What a method sees of a block: statistics of its layers' inputs, as they are by then.

A layer's statistics are taken when the layers before it are compressed already, those in its own
block too. Where a method asks for it, the batches also go through the block as it was, so
that a layer can make up for what the layers before it have changed: its drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from edgelm import layers
from edgelm.compress.distributed import combine
from edgelm.compress.sequential import Flow, advance_, hidden_of
from edgelm.errors import CompressionError
from edgelm.statistics import ActivationStatistics

Statistics = dict[str, ActivationStatistics]


@dataclass(frozen=True)
class OpenBlock:
    """A block that is being compressed, and the batches at its door.

    Attributes:
        path: Its name in the model.
        index: Its number.
        module: The block, float32; compressed layer by layer.
        dense: A copy of it as the step found it; None where drift is not followed.
        where: The model's architecture.
        config: The model's config.
        sets: The flows to compute with, and those to judge by.
        dense_sets: The same through the model as the step found it; empty without drift.
    """

    path: str
    index: int
    module: nn.Module
    dense: nn.Module | None
    where: layers.Architecture
    config: Any
    sets: Sequence[Sequence[Flow]]
    dense_sets: Sequence[Sequence[Flow]] = ()

    def layer(self, name: str) -> nn.Module:
        """A linear layer, by its name in the block."""
        return self.module.get_submodule(name)

    def full(self, name: str) -> str:
        """A layer's name in the model."""
        return f"{self.path}.{name}"

    def observe(
        self, names: Sequence[str], *, final: bool = False
    ) -> tuple[Statistics, Statistics]:
        """Statistics of the inputs of linear layers as they are now, from either set.

        Args:
            names: Of layers, in the order in which they run.
            final: Nothing more will be observed in this block: the batches of the model as
                it was go through it on the way.

        Returns:
            Statistics by layer name, to compute with and to judge by.

        Raises:
            CompressionError: An input of a layer is not finite.
        """
        fit, held_out = (
            observe(
                self.module,
                self.index,
                flows,
                names,
                self.where,
                (self.dense, self.dense_sets[number]) if self.dense else None,
                self.path,
                final=final,
            )
            for number, flows in enumerate(self.sets)
        )
        return fit, held_out

    def tokens(self, names: Sequence[str], limit: int) -> list[list[torch.Tensor]]:
        """Inputs of linear layers, token by token.

        Args:
            names: Of layers, in the order in which they run.
            limit: Most tokens of either set; those of the first texts.

        Returns:
            For either set and each layer float32 ``[tokens, in]``; padding left out.
        """
        found = []
        for flows in self.sets:
            parts: list[list[torch.Tensor]] = [[] for _ in names]
            for flow in flows:
                if sum(map(len, parts[0])) >= limit:
                    break
                real = flow.weights > 0
                for call in watch(self.module, self.index, flow, names, self.where):
                    inputs = call.inputs.reshape(*real.shape, -1)
                    parts[names.index(call.layer)].append(inputs[real])
            found.append([torch.cat(part)[:limit] for part in parts])
        return found

    def advance_(self) -> None:
        """Move all batches through the block, in place."""
        for flows in self.sets:
            advance_(self.module, self.index, flows)
        for flows in self.dense_sets:
            assert self.dense is not None
            advance_(self.dense, self.index, flows)


def observe(
    block: nn.Module,
    index: int,
    flows: Sequence[Flow],
    names: Sequence[str],
    where: layers.Architecture,
    beside: tuple[nn.Module, Sequence[Flow]] | None = None,
    path: str = "block",
    *,
    final: bool = False,
) -> Statistics:
    """Statistics of the inputs of a block's linear layers, over all processes' texts.

    Args:
        block: The block, in evaluation mode.
        index: Its number.
        flows: The batches, at the door of the block; they stay there.
        names: The layers to watch; the block runs no further than these need.
        where: The model's architecture.
        beside: The block as it was with flows of its own, to follow the drift; the
            watched layers of both must still be the same.
        path: How to name the block in an error.
        final: Bring the flows of ``beside`` through the block on the way.

    Returns:
        Statistics by layer name. Layers that share an input share all but the drift.

    Raises:
        CompressionError: An input of a layer is not finite.
    """
    collected: Statistics = {}
    rows: dict[str, tuple[str, slice]] = {}
    for number, flow in enumerate(flows):
        now = watch(block, index, flow, names, where)
        if beside is not None:
            dense, dense_flows = beside
            before = watch(
                dense, index, dense_flows[number], names, where, through=final
            )
        for shared in _by_input(now, flow.weights.numel()):
            inputs = now[shared[0]].inputs.reshape(*flow.weights.shape, -1)
            drift = None
            if beside is not None:
                moved = [before[i].output - now[i].output for i in shared]
                drift = torch.cat(moved, dim=-1).reshape(*flow.weights.shape, -1)
            new = ActivationStatistics.of(inputs, flow.weights, gram=True, drift=drift)
            leader, first = now[shared[0]].layer, 0
            if not bool(torch.isfinite(new.scatter).all()):
                raise CompressionError(
                    f"The inputs of {path}.{leader} are not finite. "
                    "Check the model's weights for NaN."
                )
            for i in shared:
                last = first + now[i].output.shape[-1]
                rows[now[i].layer] = (leader, slice(first, last))
                first = last
            known = collected.get(leader)
            collected[leader] = new if known is None else known.add_(new)
    whole = {leader: combine(own) for leader, own in collected.items()}
    return {
        name: whole[leader].of_outputs(part) for name, (leader, part) in rows.items()
    }


def stream_variance(
    block: nn.Module,
    index: int,
    flows: Sequence[Flow],
    name: str,
    where: layers.Architecture,
) -> float:
    """Variance of a projection's output with the residual beside it, over all features.

    What is lost in the output weighs as much as it is of this, which is what goes on.
    """
    total: ActivationStatistics | None = None
    for flow in flows:
        for call in watch(block, index, flow, [name], where):
            found = ActivationStatistics.of(
                call.output.reshape(*flow.weights.shape, -1), flow.weights
            )
            total = found if total is None else total.add_(found)
    assert total is not None
    return float(combine(total).variance.sum())


@dataclass(frozen=True)
class _Call:
    """One call of a linear layer.

    Attributes:
        layer: Its name in the block.
        inputs: What went in.
        output: What came out; with the residual beside it, where it joins one.
    """

    layer: str
    inputs: torch.Tensor
    output: torch.Tensor


class _Enough(Exception):
    """Nothing that is still to run in the block is asked for."""


def watch(
    block: nn.Module,
    index: int,
    flow: Flow,
    names: Sequence[str],
    where: layers.Architecture,
    *,
    through: bool = False,
) -> list[_Call]:
    """The calls of some layers in a block, in order; ``through`` brings the flow behind it."""
    calls = [(args, kwargs) for called, args, kwargs in flow.calls if called == index]
    hidden = flow.hidden.to(flow.weights.device)
    found: list[_Call] = []
    first_ffn: list[torch.Tensor] = []
    to_the_end = through or (where.residual == "pre" and where.ffn_out in names)
    wanted, last, since = set(names), False, 0

    def hook(name: str) -> Callable[..., None]:
        def see(
            module: nn.Module, args: tuple[torch.Tensor], out: torch.Tensor
        ) -> None:
            found.append(_Call(name, args[0], out))
            if last and not to_the_end and {c.layer for c in found[since:]} == wanted:
                raise _Enough

        return see

    watched = {name: hook(name) for name in names}
    handles = [
        block.get_submodule(name).register_forward_hook(see)
        for name, see in watched.items()
    ]
    if where.residual == "post" and where.ffn_out in names:
        handles.append(
            block.get_submodule(where.ffn_in[0]).register_forward_pre_hook(
                lambda _, args: first_ffn.append(args[0])
            )
        )
    try:
        for number, (args, kwargs) in enumerate(calls):
            last, since = number == len(calls) - 1, len(found)
            output = hidden
            with suppress(_Enough):
                output = hidden_of(block(hidden, *args, **kwargs))
            for i, call in enumerate(found[since:], since):
                residual: torch.Tensor | float = 0.0
                if call.layer == where.attention_out and where.residual:
                    residual = hidden
                elif call.layer == where.ffn_out and where.residual == "post":
                    residual = first_ffn.pop()
                elif call.layer == where.ffn_out and where.residual == "pre":
                    residual = output - call.output
                found[i] = replace(call, output=call.output + residual)
            hidden = output
    finally:
        for handle in handles:
            handle.remove()
    if through:
        flow.pass_(index, hidden)
    return found


def _by_input(calls: Sequence[_Call], tokens: int) -> list[list[int]]:
    """Calls of the same input together; but those whose input is not of tokens.

    DeBERTa also projects relative positions.
    """
    groups: list[list[int]] = []
    for i, call in enumerate(calls):
        if call.inputs.shape[:-1].numel() != tokens:
            continue
        if groups and calls[groups[-1][0]].inputs is call.inputs:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
