"""Compression: a step is a frozen config plus a function; this dict is the registry."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelm import layers, schema
from edgelm.compress import allocation, distributed, sequential, shrink
from edgelm.compress.blocks import Blocks
from edgelm.compress.domains import Domains, add_domains
from edgelm.compress.factorllm import FactorLLM
from edgelm.compress.layer import LayerReport
from edgelm.compress.observe import OpenBlock
from edgelm.compress.routed import add_routing
from edgelm.compress.shrink import Shrink, shrink_block
from edgelm.compress.sizes import sizes
from edgelm.compress.sparsify import Sparsify, sparsify_block
from edgelm.errors import CompressionError

if TYPE_CHECKING:
    from edgelm.calibration import Batch

__all__ = [
    "METHODS",
    "Blocks",
    "Domains",
    "FactorLLM",
    "LayerReport",
    "Method",
    "Shrink",
    "Sparsify",
    "compress",
]


@dataclass(frozen=True)
class Method:
    """A compression method.

    Attributes:
        config: Its config, which also says what to ``skip`` and whether it
            ``follows_drift``.
        plan: From the config of a step to that of each block.
        block: What compresses a block.
        run: The whole step instead of the two, for a method with several models at once.
    """

    config: type[Any]
    plan: Callable[[Any, Blocks, int, Sequence[Batch]], list[Any]] | None = None
    block: Callable[[OpenBlock, Any], list[LayerReport]] | None = None
    run: Callable[..., list[dict[str, Any]]] | None = None


METHODS: dict[str, Method] = {
    "domains": Method(Domains, run=add_domains),
    "factorllm": Method(FactorLLM, run=add_routing),
    "shrink": Method(Shrink, shrink.plan, shrink_block),
    "sparsify": Method(Sparsify, allocation.plan, sparsify_block),
}

Progress = Callable[[str, int, int], None]


def compress(
    blocks: Blocks,
    steps: Sequence[Any],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    progress: Progress = lambda name, done, total: None,
) -> list[dict[str, Any]]:
    """Run compression steps on a model, in place and in order.

    Args:
        blocks: The model, in evaluation mode.
        steps: Configs of methods.
        batches: Calibration tokens. Every step takes its statistics anew.
        held_out: Other tokens, to judge results by.
        progress: Called after each block with the step's name, blocks done and blocks in all.

    Returns:
        A row for each layer of each step: its report, the step's number, its share of the
        block's seconds, and its bytes (`edgelm.compress.sizes`).

    Raises:
        CompressionError: A step cannot give a correct result, or changed nothing.
        ModelError: The architecture is not known.
    """
    import torch

    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for number, step in enumerate(steps):
            done = _run_step(blocks, number, step, (batches, held_out), progress)
            if not done:
                raise CompressionError(
                    f"The step '{method_of(step)[0]}' changed no layer."
                )
            rows += done
    return rows


def _run_step(
    blocks: Blocks,
    number: int,
    step: Any,
    sets: tuple[Sequence[Batch], Sequence[Batch]],
    progress: Progress,
) -> list[dict[str, Any]]:
    name, method = method_of(step)
    if method.run is not None:
        return method.run(blocks, number, step, sets, progress)
    assert method.plan is not None
    _check_skip(blocks, step.skip)
    rows: list[dict[str, Any]] = []
    plan = method.plan(step, blocks, number, sets[0])
    with blocks.around(), blocks.open(number, 0):
        now = [sequential.start(blocks.model, b, blocks.spill) for b in sets]
    before = [sequential.copies(f, blocks.spill) for f in now if step.follows_drift]
    config = blocks.model.config
    where = layers.of_config(config)
    for index, path in enumerate(blocks.names):
        with blocks.open(number, index) as block:
            dense = copy.deepcopy(block) if step.follows_drift else None
            opened = OpenBlock(path, index, block, dense, where, config, now, before)
            if distributed.all_agree(blocks.is_finished(number, index)):
                done = blocks.restore(number, index)
            else:
                done = _run_block(blocks, number, opened, plan[index], method)
                blocks.finish(number, index, done)
            opened.advance_()
        rows += done
        progress(name, index + 1, len(blocks))
    return rows


def _run_block(
    blocks: Blocks, number: int, block: OpenBlock, step: Any, method: Method
) -> list[dict[str, Any]]:
    began = time.monotonic()
    assert method.block is not None
    reports = method.block(block, step)
    seconds = (time.monotonic() - began) / max(len(reports), 1)
    rows = []
    for report in reports:
        parts = [
            sizes(
                blocks.stored_weight(
                    block.index, block.layer(name.removeprefix(f"{block.path}."))
                )
            )
            for name in report.parts or (report.layer,)
        ]
        row = {
            **schema.plain(report),
            "step": number,
            "seconds": round(seconds, 3),
            "bytes": {way: sum(p[way] for p in parts) for way in parts[0]},
        }
        rows.append(row)
    return rows


def _check_skip(blocks: Blocks, skip: Sequence[str]) -> None:
    linears = layers.of_config(blocks.model.config).linears
    for part in skip:
        if not any(part in f"{path}.{n}" for path in blocks.names for n in linears):
            raise CompressionError(
                f"--skip '{part}' matches no layer. The layers of a block: {', '.join(linears)}."
            )


def method_of(step: Any) -> tuple[str, Method]:
    """Name and method of a config."""
    for name, method in METHODS.items():
        if type(step) is method.config:
            return name, method
    raise CompressionError(
        f"There is no method for {type(step).__name__}. Known: {', '.join(METHODS)}."
    )
