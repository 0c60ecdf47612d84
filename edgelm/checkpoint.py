"""Checkpoint: a folder that transformers loads, and beside the weights what was done to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgelm
from edgelm import provenance, sentence
from edgelm.atomic import new_folder
from edgelm.models import EXPERTS, LoadedModel
from edgelm.reports.compression import compression_page

if TYPE_CHECKING:
    import torch

    from edgelm.experts import Routing

REPORT = "edgelm.json"
PAGE = "report.html"
FORMAT_VERSION = 1
# Most bytes of weights in one file of a streamed checkpoint, so in memory at once.
SHARD_BYTES = 512 << 20

Tensors = Iterator[tuple[str, "torch.Tensor"]]


def save_checkpoint(
    loaded: LoadedModel,
    path: Path,
    *,
    recipe: Mapping[str, Any],
    calibration_digest: str,
    report: Sequence[Mapping[str, Any]],
    cost: Mapping[str, float],
    weights: Tensors | None = None,
    experts: Mapping[str, torch.Tensor] | None = None,
    routing: Routing | None = None,
    codes: Callable[[Path], Mapping[str, Any]] | None = None,
    device: str = "cpu",
    force: bool = False,
) -> None:
    """Write a compressed model.

    Args:
        loaded: The model, compressed in place.
        path: The folder to make.
        recipe: What was done, as `recipe.to_plain` gives it.
        calibration_digest: SHA-256 (hex) of the calibration texts.
        report: What happened to each layer.
        cost: ``texts`` and ``tokens`` calibrated on, ``seconds``, ``peak_mib``.
        weights: The weights one by one, where the model does not hold them itself.
        experts: What domains have instead of the model's own, by ``domain/parameter``.
        routing: Who chooses among its experts, where it has routed ones.
        codes: Fits codes to the model in a folder, writes them there and says what they are.
        device: What computed, for the record.
        force: Replace a checkpoint that is there already.

    Raises:
        OutputExistsError: ``path`` exists and may not be replaced.
    """
    from edgelm import widths

    units = widths.of_model(loaded.model)
    # Codes of another model's embeddings are not this one's.
    before = [step for step in loaded.steps if step["method"] != "codes"]
    about: dict[str, Any] = {
        "format": "edgelm-checkpoint",
        "format_version": FORMAT_VERSION,
        "created_by": f"edgelm {edgelm.__version__}",
        "task": loaded.task,
        "model": {"name": loaded.name, "source_digest": loaded.source_digest},
        "steps": [*before, *recipe["steps"]],
        "recipe": recipe,
        "calibration_digest": calibration_digest,
        "widths": widths.padding(loaded.model.config, units),
        "cost": cost,
        "report": report,
    }
    if experts:
        names = dict.fromkeys(name.partition("/")[0] for name in experts)
        about["domains"] = list(names)
    if routing is not None:
        about["routing"] = routing.describe()
    with new_folder(path, marker=REPORT, force=force) as folder:
        if weights is None:
            widths.make_loadable_(loaded.model, units)
            widths.describe_(loaded.model.config, units)
            loaded.model.save_pretrained(folder)
        else:
            _write_shards(folder, weights)
            widths.describe_(loaded.model.config, units)
            loaded.model.config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        if experts:
            from safetensors.torch import save_file

            stored = {name: x.contiguous() for name, x in experts.items()}
            save_file(stored, folder / EXPERTS)
        if routing is not None:
            routing.save(folder)
        is_cross_encoder = sentence.is_cross_encoder(loaded.folder)
        if loaded.task == ("scoring" if is_cross_encoder else "embedding"):
            for name in sentence.files(loaded.folder):
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(loaded.folder / name, folder / name)
        about["lineage"] = provenance.extend(
            provenance.lineage_of(loaded),
            provenance.done(
                "compress",
                provenance.COMPRESSES,
                recipe=recipe,
                vocabulary=loaded.steps[-1] if "vocabulary" in recipe else None,
                calibration={
                    "texts": recipe["calibration"]["texts"],
                    "count": cost["texts"],
                    "seed": recipe["calibration"]["seed"],
                    "digest": calibration_digest,
                },
                device=device,
                weights=provenance.weights_digest(folder),
            ),
        )
        _write_report(folder, about)
        if codes is not None:
            about["codes"] = codes(folder)
            _write_report(folder, about)
        (folder / PAGE).write_text(compression_page(about), encoding="utf-8")


def _write_report(folder: Path, about: Mapping[str, Any]) -> None:
    text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")


def _write_shards(folder: Path, weights: Tensors) -> None:
    """Write tensors to files of limited size, named and indexed as transformers does."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    batch: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        name = folder / f"{len(shards)}.part"
        save_file({k: v.contiguous() for k, v in batch.items()}, name, {"format": "pt"})
        shards.append(list(batch))
        batch.clear()

    for name, tensor in weights:
        held = sum(t.nbytes for t in batch.values())
        if batch and held + tensor.nbytes > SHARD_BYTES:
            flush()
        batch[name] = tensor
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.part").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
