"""What a token counts in the statistics, where the dense model has a say in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from edgelm.compress import sequential
from edgelm.compress.blocks import Blocks

if TYPE_CHECKING:
    from edgelm.calibration import Batch

# The least that a token counts. Most tokens are outside of all entities, and what is next to one
# decides where it ends.
FLOOR = 0.05


def by_entity(blocks: Blocks, batches: Sequence[Batch], outside: int) -> list[Batch]:
    """Weigh tokens by how likely the dense model finds an entity there.

    Nearly all tokens of a text lie outside of entities, and the model is sure of it: an error
    there changes no label. A token counts ``p`` of an entity, at least `FLOOR`, times what it
    counted before.

    Args:
        blocks: The dense model, a token classifier.
        batches: Calibration tokens.
        outside: Number of the label ``O``.

    Returns:
        The batches with new weights.
    """
    with torch.no_grad():
        logits = _logits(blocks, batches)
    return [
        replace(
            batch,
            token_weights=batch.weights
            * (1 - scores.softmax(dim=-1)[..., outside]).clamp(min=FLOOR),
        )
        for batch, scores in zip(batches, logits, strict=True)
    ]


def _logits(blocks: Blocks, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """What the dense model gives, float32 on the CPU, with one block in memory at a time."""
    with blocks.around(), blocks.open(0, 0):
        flows = sequential.start(blocks.model, batches, blocks.spill)
    for index in range(len(blocks)):
        with blocks.open(0, index) as block:
            sequential.advance_(block, index, flows)
    with blocks.around(head=True), blocks.open(0, 0):
        return [
            sequential.finish(blocks.model, batch, flow)
            for batch, flow in zip(batches, flows, strict=True)
        ]
