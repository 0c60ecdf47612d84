"""Compression: a step is a frozen config plus a function; this dict is the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgelm.compress.sparsify import LayerReport, Sparsify, sparsify_block
from edgelm.errors import CompressionError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from edgelm.calibration import Batch

__all__ = ["METHODS", "LayerReport", "Method", "Sparsify", "compress"]


@dataclass(frozen=True)
class Method:
    """A compression method: its config and the function that compresses a block."""

    config: type[Any]
    block: Callable[..., list[LayerReport]]


METHODS: dict[str, Method] = {"sparsify": Method(Sparsify, sparsify_block)}

Progress = Callable[[str, int, int], None]


def compress(
    model: PreTrainedModel,
    steps: Sequence[Any],
    batches: Sequence[Batch],
    held_out: Sequence[Batch],
    progress: Progress = lambda name, done, total: None,
) -> list[LayerReport]:
    """Run compression steps on a model, in place and in order.

    Args:
        model: A model of transformers, in evaluation mode.
        steps: Configs of methods.
        batches: Calibration tokens. Every step takes its statistics anew.
        held_out: Other tokens, to judge results by.
        progress: Called after each block with the step's name, blocks done and blocks in all.

    Returns:
        A report for each layer of each step.

    Raises:
        CompressionError: A step cannot give a correct result, or changed nothing.
        ModelError: The architecture is not known.
    """
    import torch

    reports: list[LayerReport] = []
    with torch.no_grad():
        for step in steps:
            done = _run_step(model, step, (batches, held_out), progress)
            if not done:
                raise CompressionError(
                    f"The step '{method_of(step)[0]}' changed no layer."
                )
            reports += done
    return reports


def _run_step(
    model: PreTrainedModel,
    step: Any,
    sets: tuple[Sequence[Batch], Sequence[Batch]],
    progress: Progress,
) -> list[LayerReport]:
    from edgelm import layers
    from edgelm.compress import sequential

    name, method = method_of(step)
    blocks = layers.blocks(model)
    count = len(blocks)
    names = [
        f"{path}.{n}" for path, block in blocks for n, _ in layers.linears(model, block)
    ]
    for part in step.skip:
        if not any(part in layer for layer in names):
            raise CompressionError(
                f"--skip '{part}' matches no layer. The layers of a block: {', '.join(names[: len(names) // count])}."
            )
    reports: list[LayerReport] = []
    flows = [sequential.start(model, batches) for batches in sets]
    for index, (path, block) in enumerate(blocks):
        fit, judge = (
            {f"{path}.{n}": found for n, found in seen.items()}
            for seen in (sequential.observe(model, index, part) for part in flows)
        )
        linears = {f"{path}.{n}": layer for n, layer in layers.linears(model, block)}
        reports += method.block(linears, step, fit, judge)
        for part in flows:
            sequential.advance_(model, index, part)
        progress(name, index + 1, len(blocks))
    return reports


def method_of(step: Any) -> tuple[str, Method]:
    """Name and method of a config."""
    for name, method in METHODS.items():
        if type(step) is method.config:
            return name, method
    raise CompressionError(
        f"There is no method for {type(step).__name__}. Known: {', '.join(METHODS)}."
    )


def describe(step: Any) -> Mapping[str, Any]:
    """A step as a recipe writes it."""
    from edgelm import schema

    name, method = method_of(step)
    return {"method": name, "version": method.config.version, **schema.plain(step)}
