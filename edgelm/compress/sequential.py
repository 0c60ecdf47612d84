"""Block by block, layer by layer: statistics of a layer's input as it is by then.

Each batch goes through the model once to record how its blocks are called; after
that only blocks run. A layer's statistics are taken when the layers before it are
compressed already, those in its own block too. Beside that, where a method asks for it, the
batches flow through the model as it was, so that a layer can make up for what the
layers before it have changed (its drift). Hidden states and statistics are float32
whatever the model's dtype is.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgelm import layers
from edgelm.compress.distributed import combine
from edgelm.errors import CompressionError
from edgelm.statistics import ActivationStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelm.calibration import Batch

Statistics = dict[str, ActivationStatistics]


@dataclass
class Flow:
    """One batch on its way through the blocks.

    Attributes:
        hidden: Input of the next block, ``[batch, sequence, width]``.
        weights: Weight of each token, ``[batch, sequence]``; 0 for padding.
        calls: For each call of a block, in order: its index among the blocks, and
            its arguments but the hidden states.
        spilled: Whether ``hidden`` is a file that the system pages in when it is read.
    """

    hidden: torch.Tensor
    weights: torch.Tensor
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )
    spilled: bool = False


def start(
    model: PreTrainedModel, batches: Sequence[Batch], spill: Path | None = None
) -> list[Flow]:
    """Bring batches to the door of the first block.

    Args:
        model: In evaluation mode; the first block open, the others may be empty.
        batches: Token ids.
        spill: Folder for the hidden states, which else stay in memory.

    Returns:
        A flow for each batch. Only the first block runs for real here: what the
        others get besides hidden states does not depend on these.
    """
    found = [block for _, block in layers.blocks(model)]
    device = next(found[0].parameters()).device
    flows = []
    for batch in batches:
        mask = batch.attention_mask.to(device)
        flow = Flow(torch.empty(0), batch.weights.to(device))
        with _recording(found, flow), _float32(model, found):
            base: nn.Module = model.base_model
            known = inspect.signature(base.forward).parameters
            options: dict[str, Any] = (
                {"use_cache": False} if "use_cache" in known else {}
            )
            if batch.token_type_ids is not None and "token_type_ids" in known:
                options["token_type_ids"] = batch.token_type_ids.to(device)
            base(input_ids=batch.input_ids.to(device), attention_mask=mask, **options)
        if spill is not None:
            flow.hidden, flow.spilled = _spilled(flow.hidden, spill), True
        flows.append(flow)
    return flows


def copies(flows: Sequence[Flow], spill: Path | None = None) -> list[Flow]:
    """Flows of the same calls with hidden states of their own."""
    return [
        replace(f, hidden=_spilled(f.hidden, spill) if spill else f.hidden.clone())
        for f in flows
    ]


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

    def observe(self, names: Sequence[str]) -> tuple[Statistics, Statistics]:
        """Statistics of the inputs of linear layers as they are now, from either set.

        Args:
            names: Of layers, in the order in which they run.

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
                for call in _watch(self.module, self.index, flow, names, self.where):
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

    Returns:
        Statistics by layer name. Layers that share an input share all but the drift.

    Raises:
        CompressionError: An input of a layer is not finite.
    """
    collected: Statistics = {}
    rows: dict[str, tuple[str, slice]] = {}
    for number, flow in enumerate(flows):
        now = _watch(block, index, flow, names, where)
        if beside is not None:
            dense, dense_flows = beside
            before = _watch(dense, index, dense_flows[number], names, where)
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
        for call in _watch(block, index, flow, [name], where):
            found = ActivationStatistics.of(
                call.output.reshape(*flow.weights.shape, -1), flow.weights
            )
            total = found if total is None else total.add_(found)
    assert total is not None
    return float(combine(total).variance.sum())


def advance_(block: nn.Module, index: int, flows: Sequence[Flow]) -> None:
    """Move all batches through a block, in place."""
    for flow in flows:
        hidden = _advance(block, index, flow)
        flow.hidden = flow.hidden.copy_(hidden) if flow.spilled else hidden


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


def _watch(
    block: nn.Module,
    index: int,
    flow: Flow,
    names: Sequence[str],
    where: layers.Architecture,
) -> list[_Call]:
    """The calls of some layers in a block, in order."""
    calls = [(args, kwargs) for called, args, kwargs in flow.calls if called == index]
    hidden = flow.hidden.to(flow.weights.device)
    found: list[_Call] = []
    first_ffn: list[torch.Tensor] = []
    to_the_end = where.residual == "pre" and where.ffn_out in names
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
                output = _hidden(block(hidden, *args, **kwargs))
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


def _hidden(output: Any) -> torch.Tensor:
    """The hidden states in what a block gives."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _advance(block: nn.Module, index: int, flow: Flow) -> torch.Tensor:
    """Through every call of a block; ALBERT calls its one block for every layer."""
    hidden = flow.hidden.to(flow.weights.device)
    for called, args, kwargs in flow.calls:
        if called == index:
            hidden = _hidden(block(hidden, *args, **kwargs))
    return hidden


def _spilled(hidden: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy in a file without a name: it goes with the process, however that ends."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(hidden.nbytes)
        size = hidden.numel()
        mapped = torch.from_file(file.name, shared=True, size=size, dtype=hidden.dtype)
    return mapped.view(hidden.shape).copy_(hidden)


@contextmanager
def _recording(found: Sequence[nn.Module], flow: Flow) -> Iterator[None]:
    """While open, blocks note their calls and pass hidden states on.

    The first call runs; the others give what it gave, with their own hidden states.
    """
    template: list[Any] = []
    originals = [block.forward for block in found]

    def recorder(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            if args:
                hidden, args = args[0], args[1:]
            else:
                hidden = kwargs.pop("hidden_states")
            flow.calls.append((index, args, kwargs))
            if not template:
                flow.hidden = hidden
                template.append(originals[index](hidden, *args, **kwargs))
                return template[0]
            if isinstance(template[0], torch.Tensor):
                return hidden
            return (hidden, *template[0][1:])

        return forward

    try:
        for index, block in enumerate(found):
            block.forward = recorder(index)
        yield
    finally:
        for block in found:
            del block.forward


@contextmanager
def _float32(model: PreTrainedModel, found: Sequence[nn.Module]) -> Iterator[None]:
    """While open, everything outside the blocks computes in float32.

    Embedding tables, the one thing there that is large, stay as they are: what they
    give is converted instead.
    """
    inside = {id(module) for block in found for module in block.modules()}
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    handles = []
    for module in model.base_model.modules():
        if id(module) in inside:
            continue
        if isinstance(module, nn.Embedding):
            handles.append(
                module.register_forward_hook(lambda _, args, output: output.float())
            )
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                changed.append((parameter, parameter.data))
                parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter, data in changed:
            parameter.data = data
        for handle in handles:
            handle.remove()
