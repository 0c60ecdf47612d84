"""Which model a number is of: digests, steps and files; and on which machine it was taken."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import edgelm
from edgelm import schema
from edgelm.bundle import MANIFEST, file_digest, is_bundle, open_bundle
from edgelm.manifest import Manifest
from edgelm.provenance import of_bundle, of_checkpoint, versions
from edgelm.runtimes.sensors import cpu_clock
from edgelm.runtimes.workers import cpu_name
from edgelm.targets.board import ROOT

_PACKAGES = (
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tokenizers",
    "torch",
    "transformers",
    "scipy",
    "ir-measures",
)


def identity(reference: str, manifest: Manifest) -> dict[str, Any]:
    """What a bundle or model is, as plain data.

    Args:
        reference: What was opened.
        manifest: What is known of it.

    Returns:
        ``name``, ``kind``, ``task``, ``precision``, ``digest`` (SHA-256: of a bundle's manifest, which
        holds those of its files; of a model's weight files), ``source`` (name and
        SHA-256 of the original weights), ``steps``, ``files`` with their bytes, and where edgelm made
        it ``lineage``, the chain from the original weights (`edgelm.provenance`).
    """
    about = {
        "name": reference,
        "kind": "bundle" if is_bundle(reference) else "model",
        "task": manifest.task,
        "precision": manifest.precision,
        "source": {
            "name": manifest.model.name,
            "digest": manifest.model.source_digest,
        },
        "steps": [schema.plain(step) for step in manifest.model.steps],
    }
    if is_bundle(reference):
        bundle = open_bundle(reference)
        sizes = {name: info.size for name, info in bundle.manifest.files.items()}
        digest = file_digest(bundle.path / MANIFEST)
        chain = {"lineage": of_bundle(manifest)}
        return {**about, "target": manifest.target, "digest": digest, "files": sizes, **chain}  # fmt: skip
    return {**about, **of_folder(reference, manifest.model.source_digest)}


def of_folder(reference: str, source_digest: str) -> dict[str, Any]:
    """``digest`` of a model's weights and its ``files``; a checkpoint's ``recipe`` and calibration.

    What is no checkpoint is its source, whose digest holds an adapter too.
    """
    from edgelm.models import locate

    folder = locate(reference)
    weights = sorted(folder.glob("*.safetensors"))
    checkpoint = schema.read_json(folder / "edgelm.json")
    own = hashlib.sha256("".join(map(file_digest, weights)).encode()).hexdigest()
    names = ("tokenizer.json", "config.json")
    kept = [*weights, *(folder / name for name in names)]
    about: dict[str, Any] = {
        "digest": own if checkpoint else source_digest,
        "files": {p.name: p.stat().st_size for p in kept if p.is_file()},
    }
    about |= {k: checkpoint[k] for k in ("recipe", "calibration_digest") if k in checkpoint}  # fmt: skip
    if checkpoint:
        about["lineage"] = of_checkpoint(checkpoint)
    return about


def size_bytes(reference: str, files: Mapping[str, int]) -> int:
    """Bytes on the disk: of a bundle as it was named, else of the files of a model."""
    if not is_bundle(reference):
        return sum(files.values())
    bundle = open_bundle(reference)
    return bundle.archive.stat().st_size if bundle.archive else bundle.size_bytes


def machine(root: Path = ROOT) -> dict[str, Any]:
    """The machine and the versions that a number belongs to, and when it was taken."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cpu_clock": schema.plain(cpu_clock(root)),
        "versions": {"edgelm": edgelm.__version__, **versions(_PACKAGES)},
        "measured_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
