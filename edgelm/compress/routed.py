"""FactorLLM as a step of a recipe: the model routed, and a static one of the active width beside it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgelm import layers, schema, widths
from edgelm.compress import distributed
from edgelm.compress.blocks import Blocks
from edgelm.compress.factorllm import FactorLLM, factorize_, last_hidden
from edgelm.compress.layer import LayerReport
from edgelm.compress.routing import contiguous
from edgelm.compress.shrink import Shrink
from edgelm.compress.sizes import sizes
from edgelm.errors import CompressionError
from edgelm.experts import Routing
from edgelm.streaming import set_parameters_

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelm.calibration import Batch

Progress = Callable[[str, int, int], None]


def add_routing(
    blocks: Blocks,
    number: int,
    step: FactorLLM,
    sets: tuple[Sequence[Batch], Sequence[Batch]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Route a model's feed-forward networks among experts.

    Args:
        blocks: The model, held whole; afterwards its experts' neurons stand side by side, with
            the weights that they were adapted to, and ``blocks.routing`` chooses among them.
        number: The step's number.
        step: What to do.
        sets: Batches to compute with and to judge by.
        progress: As for `edgelm.compress.compress`.

    Returns:
        A row a network: the share of its output's variance that is lost where it stands in the
        model, the same for the static model under ``tried``.

    Raises:
        CompressionError: `factorize_` refuses the model, or several processes share the text.
    """
    if distributed.world() > 1:
        raise CompressionError(
            "FactorLLM adapts its experts in one process. Start edgelm without torchrun."
        )
    began, model = time.monotonic(), blocks.model
    dense, work, static = (copy.deepcopy(model) for _ in range(3))
    for each in (dense, work, static):
        nn.Module.to(each, blocks.device, torch.float32)
    found = factorize_(
        work, sets[0], step, lambda done: progress("factorllm", done, step.steps)
    )
    where = layers.of_config(model.config)
    for network, (_, block) in zip(found, layers.blocks(work), strict=True):
        network.detach_()
        order, weights = network.split.flatten(), dict(block.named_parameters())
        moved = widths.map_units(
            weights, where, "neurons", len(order), widths.take(order)
        )
        set_parameters_(
            block, {name: tensor.detach() for name, tensor in moved.items()}
        )
        network.split = contiguous(len(order), step.experts)
    for own, made in zip(model.parameters(), work.parameters(), strict=True):
        own.data = made.detach().to("cpu", own.dtype)
        made.data = own.data.to(made.device, made.dtype)
    if step.active < step.experts:
        from edgelm.compress import compress

        shrink = Shrink(keep=step.active / step.experts, multiple=1)
        compress(Blocks(static, device=blocks.device), [shrink], *sets)
        nn.Module.to(static, blocks.device)
    networks = dict(zip(blocks.names, found, strict=True))
    Routing(networks, {}).attach_(work)
    lost = variance_lost(dense, {"routed": work, "static": static}, sets[1])
    for network in found:
        network.detach_()
        network.router.cpu()
    blocks.routing = Routing(
        networks, {way: errors[-1] for way, errors in lost.items()}
    )
    rows = []
    for index, path in enumerate(blocks.names):
        block = layers.blocks(model)[index][1]
        error, names = lost["routed"][index], (*where.ffn_in, where.ffn_out)
        out = layers.weight_matrix(block.get_submodule(where.ffn_out))
        report = LayerReport(
            f"{path}.{where.ffn_out}",
            (out.shape[0], out.shape[1]),
            0.0,
            error,
            error,
            error,
            "FactorLLM",
            step.objective,
            {way: errors[index] for way, errors in lost.items()},
            tuple(f"{path}.{name}" for name in names),
        )
        stored = [
            sizes(block.get_submodule(n).get_parameter("weight").detach())
            for n in names
        ]
        rows.append(
            {
                **schema.plain(report),
                "step": number,
                "seconds": round((time.monotonic() - began) / len(blocks), 3),
                "bytes": {way: sum(s[way] for s in stored) for way in stored[0]},
            }
        )
    return rows


def variance_lost(
    dense: PreTrainedModel,
    others: Mapping[str, PreTrainedModel],
    batches: Sequence[Batch],
) -> dict[str, list[float]]:
    """How far other models are from a dense one.

    Args:
        dense: The model.
        others: What was made of it, by name.
        batches: Tokens, which count by their weights.

    Returns:
        For each ``E|y' - y|^2 / E|y - E y|^2`` of what every feed-forward network gives, where it
        stands in the model, and last of the last hidden states.
    """
    count = len(layers.blocks(dense)) + 1
    weight = 0.0
    square = torch.zeros(count, dtype=torch.float64)
    total: list[Any] = [0.0] * count
    missed = {name: torch.zeros(count, dtype=torch.float64) for name in others}
    for batch in batches:
        counts = batch.weights.flatten().double()
        due = _outputs(dense, batch)
        weight += float(counts.sum())
        for i, y in enumerate(due):
            square[i] += float((counts @ y.square()).sum())
            total[i] = total[i] + counts @ y
        for name, other in others.items():
            given = _outputs(other, batch)
            for i, (y, z) in enumerate(zip(due, given, strict=True)):
                missed[name][i] += float((counts @ (z - y).square()).sum())
    spread = [
        max(float(s) - float(t.square().sum()) / weight, 1e-30)
        for s, t in zip(square, total, strict=True)
    ]
    return {
        name: [float(m) / s for m, s in zip(found, spread, strict=True)]
        for name, found in missed.items()
    }


def _outputs(model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """Of every network and of the model, float64 ``[batch * sequence, width]`` on the CPU."""
    where, seen = layers.of_config(model.config), []
    with torch.no_grad(), ExitStack() as hooks:
        for _, block in layers.blocks(model):
            calls: list[torch.Tensor] = []
            seen.append(calls)
            out = block.get_submodule(where.ffn_out)
            hooks.enter_context(
                out.register_forward_hook(
                    lambda *call, calls=calls: calls.append(call[2])
                )
            )
        last = last_hidden(model, batch)
    # Where one block is called for every layer, its last call has all the others in it.
    found = [calls[-1] for calls in seen] + [last]
    return [y.reshape(-1, y.shape[-1]).double().cpu() for y in found]
