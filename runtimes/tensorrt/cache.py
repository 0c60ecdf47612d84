"""Engines that were built here: found by what they depend on, checked before they are loaded.

A plan is executable code of one device and one TensorRT. It is loaded only if its key, its version and its
digest are those that were written down when it was verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm import schema
from edgelm.archive import cache_folder
from edgelm.bundle import file_digest
from edgelm.errors import SessionError
from edgelm.runtimes.tensorrt.header import plan_version
from edgelm.runtimes.tensorrt.plan import Profile

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Key:
    """Everything that an engine depends on.

    Attributes:
        graph: SHA-256 of the ONNX file (and of weights beside it).
        tensorrt: TensorRT's exact version.
        compute_capability: Of the GPU.
        device: The GPU's or the board's name.
        cuda: CUDA's version, as the driver tells it.
        profiles: Optimisation profiles.
        flags: Whatever else was asked of the builder.
    """

    graph: str
    tensorrt: str
    compute_capability: str
    device: str
    cuda: str
    profiles: tuple[Profile, ...]
    flags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, hex."""
        text = json.dumps(schema.plain(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Record:
    """What is written down beside a plan that was built and verified.

    Attributes:
        format_version: Of this file.
        key: What the plan depends on.
        plan_sha256: SHA-256 of the plan.
        snr_db: Agreement with the golden examples, dB.
        layer_types: How many layers touch each type, as the inspector says.
        sparse_eligible: Layers with 2:4 weights.
        sparse_picked: Those of them with a sparse kernel.
        median_ms: Median latency of the usual shape, ms, by kind of plan: ``dense`` and,
            where it was tried, ``sparse``.
        seconds: How long the build took.
    """

    format_version: int
    key: Key
    plan_sha256: str
    snr_db: float
    layer_types: Mapping[str, int]
    sparse_eligible: tuple[str, ...]
    sparse_picked: tuple[str, ...]
    median_ms: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Found:
    """What the cache has for a key.

    Attributes:
        plan: The plan; None if there is none that may be loaded.
        record: What is known of it.
        why: Why there is none, in a sentence.
    """

    plan: Path | None
    record: Record | None
    why: str


def engines_folder() -> Path:
    """Where engines are kept, in the user's cache."""
    return cache_folder() / "engines"


def find(key: Key, bundle: str, folder: Path | None = None) -> Found:
    """Look for an engine that may be loaded.

    Args:
        key: What it must depend on.
        bundle: Name of the bundle's digest; engines are kept by it, so that an engine
            of another device or version is found, and can be said to be one.
        folder: Where engines are kept; the user's cache if not given.
    """
    place = (folder or engines_folder()) / bundle
    try:
        text = (place / "record.json").read_text(encoding="utf-8")
        record = schema.build(
            Record, json.loads(text), str(place / "record.json"), SessionError
        )
    except FileNotFoundError:
        return Found(None, None, "No engine has been built for this bundle.")
    except (OSError, ValueError, SessionError) as error:
        return Found(None, None, f"The engine's record cannot be read: {error}")
    if record.format_version != FORMAT_VERSION:
        return Found(None, None, "The engine is of another version of edgelm.")
    if record.key != key:
        return Found(
            None, None, f"The engine was built for {difference(record.key, key)}."
        )
    plan = place / "engine.plan"
    try:
        version = plan_version(plan)
        digest = file_digest(plan)
    except (OSError, SessionError) as error:
        return Found(None, None, str(error))
    if not same_version(version, key.tensorrt):
        why = f"The plan is of TensorRT {version}; this is {key.tensorrt}."
        return Found(None, None, why)
    if digest != record.plan_sha256:
        return Found(None, None, "The plan has been changed since it was verified.")
    return Found(plan, record, "")


def keep(plan: Path, record: Record, bundle: str, folder: Path | None = None) -> Path:
    """Put a verified plan into the cache; both files appear whole, the record last.

    Args:
        plan: The plan, on any file system.
        record: What is known of it.
        bundle: As for `find`.
        folder: As for `find`.
    """
    place = (folder or engines_folder()) / bundle
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as work:
        (Path(work) / "engine.plan").write_bytes(plan.read_bytes())
        text = json.dumps(schema.plain(record), indent=2, sort_keys=True) + "\n"
        (Path(work) / "record.json").write_text(text, encoding="utf-8")
        (place / "record.json").unlink(missing_ok=True)
        os.replace(Path(work) / "engine.plan", place / "engine.plan")
        os.replace(Path(work) / "record.json", place / "record.json")
    return place / "engine.plan"


def difference(old: Key, new: Key) -> str:
    """In what two keys differ, for people: the first field that does."""
    for name in Key.__dataclass_fields__:
        before, now = getattr(old, name), getattr(new, name)
        if before != now:
            short = name.replace("_", " ")
            if name in ("graph", "profiles", "flags"):
                return f"another {short.removesuffix('s')}"
            return f"{short} {before}; this is {now}"
    return "the same"


def same_version(plan: str, tensorrt: str) -> bool:
    """Whether a plan's version is that of a TensorRT; as far as both state it."""
    pairs = zip(plan.split("."), tensorrt.split("."), strict=False)
    return all(a == b for a, b in pairs)
