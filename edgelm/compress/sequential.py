"""Batches on their way through a model, block by block.

Each batch goes through the model once to record how its blocks are called; after that only
blocks run, one at a time. Hidden states are float32 whatever the model's dtype is.
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgelm import layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelm.calibration import Batch


@dataclass
class Flow:
    """One batch on its way through the blocks.

    Attributes:
        hidden: Input of the next block, ``[batch, sequence, width]``.
        weights: Weight of each token, ``[batch, sequence]``; 0 for padding.
        calls: For each call of a block, in order: its index among the blocks, and
            its arguments but the hidden states.
        spilled: Whether ``hidden`` is a file that the system pages in when it is read.
        passed: How many blocks it is through.
    """

    hidden: torch.Tensor
    weights: torch.Tensor
    calls: list[tuple[int, tuple[Any, ...], dict[str, Any]]] = field(
        default_factory=list
    )
    spilled: bool = False
    passed: int = 0

    def pass_(self, index: int, hidden: torch.Tensor) -> None:
        """Bring it behind a block, with the hidden states that the block gave."""
        self.hidden = self.hidden.copy_(hidden) if self.spilled else hidden
        self.passed = index + 1


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
        flow = Flow(torch.empty(0), batch.weights.to(device))
        with _recording(found, flow), _float32(model.base_model, found):
            call(model.base_model, batch, device)
        if spill is not None:
            flow.hidden, flow.spilled = _spilled(flow.hidden, spill), True
        flows.append(flow)
    return flows


def finish(model: PreTrainedModel, batch: Batch, flow: Flow) -> torch.Tensor:
    """What the head makes of a batch that is through all blocks.

    Args:
        model: With a head; everything outside the blocks on the flow's device, and the
            first block open.
        batch: Its token ids.
        flow: Behind the last block.

    Returns:
        Logits, float32 on the CPU.
    """
    found = [block for _, block in layers.blocks(model)]
    device = flow.weights.device
    seen = Flow(torch.empty(0), flow.weights)
    last = flow.hidden.to(device)
    with _recording(found, seen, last), _float32(model, found):
        logits: torch.Tensor = call(model, batch, device).logits
    return logits.cpu()


def call(module: nn.Module, batch: Batch, device: torch.device, **options: Any) -> Any:
    """What a model, or its base model, gives for a batch.

    Args:
        module: On the device.
        batch: Token ids.
        device: Where to put them.
        options: Further arguments.
    """
    known = inspect.signature(module.forward).parameters
    if "use_cache" in known:
        options["use_cache"] = False
    if batch.token_type_ids is not None and "token_type_ids" in known:
        options["token_type_ids"] = batch.token_type_ids.to(device)
    ids, mask = batch.input_ids.to(device), batch.attention_mask.to(device)
    return module(input_ids=ids, attention_mask=mask, **options)


def copies(flows: Sequence[Flow], spill: Path | None = None) -> list[Flow]:
    """Flows of the same calls with hidden states of their own."""
    return [
        replace(f, hidden=_spilled(f.hidden, spill) if spill else f.hidden.clone())
        for f in flows
    ]


def advance_(block: nn.Module, index: int, flows: Sequence[Flow]) -> None:
    """Move all batches through a block, in place; but those that are behind it already."""
    for flow in flows:
        if flow.passed <= index:
            flow.pass_(index, advanced(block, index, flow))


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block gives."""
    return output if isinstance(output, torch.Tensor) else output[0]


def advanced(block: nn.Module, index: int, flow: Flow) -> torch.Tensor:
    """Through every call of a block; ALBERT calls its one block for every layer."""
    hidden = flow.hidden.to(flow.weights.device)
    for called, args, kwargs in flow.calls:
        if called == index:
            hidden = hidden_of(block(hidden, *args, **kwargs))
    return hidden


def _spilled(hidden: torch.Tensor, folder: Path) -> torch.Tensor:
    """A copy in a file without a name: it goes with the process, however that ends."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(hidden.nbytes)
        size = hidden.numel()
        mapped = torch.from_file(file.name, shared=True, size=size, dtype=hidden.dtype)
    return mapped.view(hidden.shape).copy_(hidden)


@contextmanager
def _recording(
    found: Sequence[nn.Module], flow: Flow, instead: torch.Tensor | None = None
) -> Iterator[None]:
    """While open, blocks note their calls and pass hidden states on.

    The first call runs; the others give what it gave, with their own hidden states. With
    ``instead`` all give that.
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
                if instead is None:
                    return template[0]
            if instead is not None:
                hidden = instead
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
def _float32(outer: nn.Module, found: Sequence[nn.Module]) -> Iterator[None]:
    """While open, everything in a module but the blocks computes in float32.

    Embedding tables, the one thing there that is large, stay as they are: what they
    give is converted instead.
    """
    inside = {id(module) for block in found for module in block.modules()}
    changed: list[tuple[nn.Parameter, torch.Tensor]] = []
    handles = []
    for module in outer.modules():
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
