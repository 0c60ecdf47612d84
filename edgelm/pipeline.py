"""From a model reference to a checkpoint: what `edgelm compress` does."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import edgelm
from edgelm import recipe as recipes
from edgelm.atomic import check_free
from edgelm.bundle import EmbeddingInfo, NerInfo, ScoringInfo
from edgelm.calibration import (
    Batch,
    Calibration,
    as_pairs,
    load_texts,
    make_batches,
    read_texts,
    split,
    text_digest,
)
from edgelm.checkpoint import REPORT, save_checkpoint
from edgelm.compress import Blocks, compress, distributed
from edgelm.compress.blocks import journal_folder, kept_if_of_use
from edgelm.compress.vocabulary import AUTO, Vocabulary, trim_vocabulary
from edgelm.compress.weighting import by_entity
from edgelm.errors import CompressionError
from edgelm.models import LoadedModel, load_model
from edgelm.tasks import Task


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes:
        layers: A row for each layer of each step.
        vocabulary: Tokens that stayed and of how many, where the vocabulary was trimmed.
        cost: ``texts`` and ``tokens`` calibrated on; ``seconds`` of wall-clock time, loading
            included; ``peak_mib``, the process's largest resident size.
    """

    layers: list[dict[str, Any]]
    cost: dict[str, float]
    vocabulary: tuple[int, int] | None = None


def calibration_batches(
    loaded: LoadedModel, texts: Sequence[str], calibration: Calibration
) -> list[Batch]:
    """Texts as the model takes them, pairs for one that scores pairs; and what counts."""
    pairs = isinstance(loaded.info, ScoringInfo) and loaded.info.inputs == "pair"
    by_text = calibration.weighting == "text" or (
        calibration.weighting == "auto" and loaded.task == "embedding"
    )
    return make_batches(
        as_pairs(texts) if pairs else texts,
        loaded.tokenizer,
        min(calibration.max_tokens, loaded.max_length),
        by_text=by_text,
    )


def calibration_sets(
    loaded: LoadedModel, blocks: Blocks, texts: Sequence[str], calibration: Calibration
) -> tuple[list[Batch], list[Batch]]:
    """Batches to compute with and batches to judge by; this process's share of them.

    Args:
        loaded: The dense model.
        blocks: The same, block by block.
        texts: Calibration texts.
        calibration: How they are taken.

    Raises:
        CompressionError: Tokens are to count by entity, and the model knows none.
    """
    fit, held_out = (
        calibration_batches(loaded, distributed.share(part), calibration)
        for part in split(texts)
    )
    labels = loaded.info.labels if isinstance(loaded.info, NerInfo) else ()
    outside = labels.index("O") if "O" in labels else None
    if calibration.weighting == "entity" and outside is None:
        raise CompressionError(
            "Only a token classifier with the label 'O' can weigh tokens by entity. "
            "Use --weighting text or token."
        )
    if outside is None or calibration.weighting not in ("auto", "entity"):
        return fit, held_out
    return by_entity(blocks, fit, outside), by_entity(blocks, held_out, outside)


def _trim(
    loaded: LoadedModel, config: Vocabulary, calibrated: Sequence[str]
) -> LoadedModel:
    """Trim the vocabulary by a file or by the calibration texts; prompts are text, too."""
    info = loaded.info
    prompts = list(info.prompts.values()) if isinstance(info, EmbeddingInfo) else []

    def texts() -> Iterator[str]:
        yield from prompts
        yield from (
            calibrated if config.texts == AUTO else read_texts(Path(config.texts))
        )

    return trim_vocabulary(loaded, config, texts, text_digest(texts()))


def compress_model(
    reference: str,
    recipe: recipes.Recipe,
    output: Path,
    *,
    task: Task | None = None,
    device: str = "cpu",
    spill: bool = False,
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
        spill: Keep the calibration text's hidden states in files beside the output
            instead of in memory.
        force: Replace a checkpoint that is there already.
        progress: Called after each block with the step's name, blocks done and blocks in all.

    Returns:
        What was done.

    Raises:
        EdgelmError: Anything that `load_model`, `load_texts`, `compress` or
            `save_checkpoint` refuse.
        KeyboardInterrupt: Finished blocks are kept; the same call goes on from there.
    """
    import torch

    began = time.monotonic()
    check_free(output, marker=REPORT, force=force)
    if device == "cuda" and not torch.cuda.is_available():
        raise CompressionError(
            "There is no CUDA device that torch can use here. Use --device cpu."
        )
    texts = load_texts(recipe.calibration)
    digest = text_digest(texts)
    # What changes the model's tables needs all of it in memory.
    loaded = load_model(reference, task, stream=recipe.vocabulary is None)
    if recipe.vocabulary is not None:
        progress("vocabulary", 0, 1)
        loaded = _trim(loaded, recipe.vocabulary, texts)
    plain = recipes.to_plain(recipe)
    journal = journal_folder(
        output,
        {
            "edgelm": edgelm.__version__,
            "torch": torch.__version__,
            "device": device,
            "weights": [loaded.name, loaded.source_digest, loaded.steps],
            "recipe": plain,
            "texts": digest,
            "process": distributed.rank(),
        },
    )
    with kept_if_of_use(journal), distributed.process_group(device):
        blocks = Blocks(
            loaded.model,
            source=loaded.weights,
            journal=journal,
            device=device,
            spill=journal if spill else None,
        )
        batches, held_out = calibration_sets(loaded, blocks, texts, recipe.calibration)
        layers = compress(blocks, recipe.steps, batches, held_out, progress)
        cost = {
            "texts": len(texts),
            "tokens": distributed.total(
                sum(int(b.attention_mask.sum()) for b in (*batches, *held_out))
            ),
            "seconds": round(time.monotonic() - began, 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        last = len(recipe.steps) - 1
        if distributed.rank() == 0:
            save_checkpoint(
                loaded,
                output,
                recipe=plain,
                calibration_digest=digest,
                report=layers,
                cost=cost,
                weights=blocks.stored(last) if loaded.weights is not None else None,
                force=force,
            )
    if recipe.vocabulary is None:
        return CompressionReport(layers, cost)
    trimmed = loaded.steps[-1]
    return CompressionReport(layers, cost, (trimmed["kept"], trimmed["of"]))
