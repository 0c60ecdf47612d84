"""From a model reference to a checkpoint: what `edgelm compress` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgelm import recipe as recipes
from edgelm.atomic import check_free
from edgelm.calibration import load_texts, make_batches, split, text_digest
from edgelm.checkpoint import REPORT, save_checkpoint
from edgelm.compress import compress
from edgelm.errors import CompressionError
from edgelm.models import load_model
from edgelm.tasks import Task


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes:
        layers: A row for each layer of each step.
        texts: Calibration texts used.
        tokens: Tokens of them used.
        seconds: Wall-clock time, loading and saving included.
    """

    layers: list[Mapping[str, Any]]
    texts: int
    tokens: int
    seconds: float


def compress_model(
    reference: str,
    recipe: recipes.Recipe,
    output: Path,
    *,
    task: Task | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> CompressionReport:
    """Load a model, run a recipe on it and write the checkpoint.

    Args:
        reference: A built-in name, a folder, or a hub id.
        recipe: What to do.
        output: The folder to make.
        task: The model's task; inferred if not given.
        device: ``cpu`` or ``cuda``.
        force: Replace a checkpoint that is there already.
        progress: Called after each block with the step's name, blocks done and blocks in all.

    Returns:
        What was done.

    Raises:
        EdgelmError: Anything that `load_model`, `load_texts`, `compress` or
            `save_checkpoint` refuse.
    """
    import torch
    from torch import nn

    began = time.monotonic()
    check_free(output, marker=REPORT, force=force)
    if device == "cuda" and not torch.cuda.is_available():
        raise CompressionError(
            "There is no CUDA device that torch can use here. Use --device cpu."
        )
    texts = load_texts(recipe.calibration)
    loaded = load_model(reference, task)
    longest = min(recipe.calibration.max_tokens, loaded.max_length)
    batches, held_out = (
        make_batches(part, loaded.tokenizer, longest) for part in split(texts)
    )
    module: nn.Module = loaded.model
    module.to(device)
    done = compress(loaded.model, recipe.steps, batches, held_out, progress)
    layers: list[Mapping[str, Any]] = [asdict(row) for row in done]
    module.to("cpu")
    save_checkpoint(
        loaded,
        output,
        recipe=recipes.to_plain(recipe),
        calibration_digest=text_digest(texts),
        report=layers,
        force=force,
    )
    tokens = sum(int(b.attention_mask.sum()) for b in (*batches, *held_out))
    return CompressionReport(layers, len(texts), tokens, time.monotonic() - began)
