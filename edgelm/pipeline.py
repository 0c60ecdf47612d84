"""From a model reference to a checkpoint: what `edgelm compress` does."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import edgelm
from edgelm import codes, schema
from edgelm import recipe as recipes
from edgelm.atomic import check_free
from edgelm.bundle import CODES
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
from edgelm.manifest import EmbeddingInfo, NerInfo, ScoringInfo
from edgelm.models import EXPERTS, LoadedModel, load_model
from edgelm.runtimes.codes import save_coder
from edgelm.streaming import give_memory_back
from edgelm.tasks import Task


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did.

    Attributes:
        layers: A row for each layer of each step.
        vocabulary: Tokens that stayed and of how many, where the vocabulary was trimmed.
        cost: ``texts`` and ``tokens`` calibrated on; ``seconds`` of wall-clock time, loading
            included; ``peak_mib``, the process's largest resident size.
        codes: What `fit_codes` says of the codes; None where there are none.
        routing: Of routed experts how many there are and how many of them are active, and the
            ``errors`` of `edgelm.experts.Routing`; None where there are none.
    """

    layers: list[dict[str, Any]]
    cost: dict[str, float]
    codes: Mapping[str, Any] | None = None
    vocabulary: tuple[int, int] | None = None
    routing: Mapping[str, Any] | None = None


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
    by_domain = {} if recipe.domains is None else recipe.domains.texts
    own = {
        name: load_texts(replace(recipe.calibration, texts=file))
        for name, file in by_domain.items()
    }
    digest = text_digest([*texts, *(t for found in own.values() for t in found)])
    # What changes the model's tables, or adapts it as a whole, needs all of it in memory.
    stream = (
        recipe.vocabulary is None and bool(recipe.layer_steps) and not recipe.routed
    )
    loaded = load_model(reference, task, stream=stream)
    if (loaded.folder / EXPERTS).is_file():
        raise CompressionError(
            f"{reference} has experts by domain, which would be lost: domains are the last step. "
            "Compress the model that it was made of, all steps in one recipe."
        )
    if loaded.routing is not None:
        raise CompressionError(
            f"{reference} has routed experts, which would be lost: 'factorllm' is the last step. "
            "Compress the model that it was made of, all steps in one recipe."
        )
    if recipe.codes is not None and loaded.task != "embedding":
        raise CompressionError(
            f"Codes are of embeddings, and {reference} is for the task {loaded.task}. Leave the codes out."
        )
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
    if loaded.weights is not None:
        give_memory_back()
    with kept_if_of_use(journal), distributed.process_group(device):
        blocks = Blocks(
            loaded.model,
            source=loaded.weights,
            journal=journal,
            device=device,
            spill=journal if spill else None,
        )
        batches, held_out = calibration_sets(loaded, blocks, texts, recipe.calibration)
        for name, found_texts in own.items():
            parts = calibration_sets(loaded, blocks, found_texts, recipe.calibration)
            batches += [replace(b, domain=name) for b in parts[0]]
            held_out += [replace(b, domain=name) for b in parts[1]]
        steps = recipe.layer_steps
        layers = compress(blocks, steps, batches, held_out, progress)
        streamed = loaded.weights is not None
        weights = blocks.stored(len(steps) - 1) if streamed else None
        cost = {
            "texts": len(texts) + sum(map(len, own.values())),
            "tokens": distributed.total(
                sum(int(b.attention_mask.sum()) for b in (*batches, *held_out))
            ),
            "seconds": round(time.monotonic() - began, 1),
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        }
        found: dict[str, Any] = {}

        def fit(folder: Path) -> Mapping[str, Any]:
            assert recipe.codes is not None
            found.update(
                fit_codes(folder, recipe.codes, texts, recipe.calibration, progress)
            )
            return found

        if distributed.rank() == 0:
            save_checkpoint(
                loaded,
                output,
                recipe=plain,
                calibration_digest=digest,
                report=layers,
                cost=cost,
                weights=weights,
                experts=blocks.experts,
                routing=blocks.routing,
                codes=None if recipe.codes is None else fit,
                device=device if device == "cpu" else torch.cuda.get_device_name(),
                force=force,
            )
    trimmed = loaded.steps[-1] if recipe.vocabulary is not None else None
    kept = None if trimmed is None else (trimmed["kept"], trimmed["of"])
    routing = None if blocks.routing is None else blocks.routing.describe()
    return CompressionReport(layers, cost, found or None, kept, routing)


def fit_codes(
    folder: Path,
    config: codes.BinaryCodes,
    texts: Sequence[str],
    calibration: Calibration,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any]:
    """Fit binary codes to the embeddings of a checkpoint and write them into it.

    Args:
        folder: The checkpoint.
        config: What codes to make.
        texts: To fit to; every eighth is kept to judge by.
        calibration: How long a text may be.
        progress: Called after each batch with ``codes``, batches done and batches in all.

    Returns:
        ``kind``, ``bits``, ``digest``, ``seconds`` of embedding and fitting, and, with 16 texts or more,
        ``held_out``: shares of the float search's ten best that held-out texts find among the others.

    Raises:
        CompressionError: `edgelm.codes.fit` refuses the embeddings.
    """
    from edgelm.embeddings import embed

    began = time.monotonic()
    loaded = load_model(str(folder))
    assert isinstance(loaded.info, EmbeddingInfo)
    prefix = loaded.info.prompts.get(loaded.info.default_prompt or "", "")
    fitted, held_out = (
        calibration_batches(loaded, [prefix + t for t in part], calibration)
        for part in split(texts)
    )
    total = len(fitted) + len(held_out)
    parts: list[NDArray[np.float32]] = []
    for batches in (fitted, held_out):
        rows = []
        for batch in batches:
            rows.append(embed(loaded, batch))
            done = len(rows) + (len(fitted) if parts else 0)
            progress("codes", done, total)
        parts.append(np.concatenate(rows))
    coder = codes.fit(parts[0], config)
    about = {
        "kind": config.kind,
        "bits": coder.bits,
        "digest": coder.digest,
        "seconds": round(time.monotonic() - began, 2),
    }
    save_coder(coder, folder / CODES)
    if len(texts) >= 16:
        about["held_out"] = schema.plain(codes.judge(coder, parts[1], parts[0]))
    return about
