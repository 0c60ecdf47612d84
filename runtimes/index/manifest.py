"""The manifest of an index: which bytes of its files count (see docs/binary-index.md).

It is replaced whole, by a rename, after every batch. What lies in a file behind the size that the manifest
states was never acknowledged; nothing in front of it is ever changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from edgelm import schema
from edgelm.errors import BinaryIndexError

FORMAT = "edgelm-index"
FORMAT_VERSION = 1
MANIFEST, LOCK = "index.json", "lock"

VectorType = Literal["int8", "float16"]
_MANIFEST_LIMIT = 1 << 20


@dataclass(frozen=True)
class EncoderInfo:
    """The encoder that made the codes.

    Attributes:
        name: The model's name, for messages.
        digest: SHA-256 over everything that decides a code: graph, tokenizer, coder.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class FileState:
    """How many bytes of a file count, and their CRC-32."""

    size: int = 0
    crc32: int = 0


@dataclass(frozen=True)
class Approximate:
    """The inverted lists over the first rows.

    Attributes:
        rows: How many rows they hold; what came later is searched exactly.
        lists: How many lists there are.
        probes: How many are searched for a query.
        recall: Part of the exact ten nearest that they found when they were made.
    """

    rows: int
    lists: int
    probes: int
    recall: float


@dataclass(frozen=True)
class Progress:
    """How much of its input a build has taken in.

    Attributes:
        lines: Lines of the input.
        crc32: CRC-32 of these lines; a build goes on only behind the same ones.
    """

    lines: int = 0
    crc32: int = 0


@dataclass(frozen=True)
class IndexManifest:
    """Everything that decides what an index is at one moment.

    Attributes:
        created_by: Version of edgelm that made it.
        bits: Width of a code.
        generation: Goes up with every batch.
        epoch: Which folder of files counts; goes up when an index is compacted.
        rows: Rows in the files, deleted ones included.
        files: State of every file in the epoch's folder.
        encoder: What made the codes; None where that is not known.
        vectors: Type of the stored vectors; None where there are none.
        dimension: Length of a stored vector.
        factors: Whether every code has a factor for asymmetric scores.
        approximate: The inverted lists, where there are any.
        progress: Of the build that began it, where one did.
    """

    created_by: str
    bits: int
    generation: int = 0
    epoch: int = 0
    rows: int = 0
    files: Mapping[str, FileState] = field(default_factory=dict)
    encoder: EncoderInfo | None = None
    vectors: VectorType | None = None
    dimension: int = 0
    factors: bool = False
    approximate: Approximate | None = None
    progress: Progress | None = None

    @property
    def folder(self) -> str:
        """Name of the folder that holds the files."""
        return f"data-{self.epoch}"


def read_manifest(index: Path) -> IndexManifest:
    """Read an index's manifest.

    Args:
        index: The index's folder.

    Raises:
        BinaryIndexError: There is none, it is damaged, or it is newer than this
            edgelm reads.
    """
    path = index / MANIFEST
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MANIFEST_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = f"holds no {MANIFEST}" if index.is_dir() else "is no folder"
        raise BinaryIndexError(
            f"{index} is not an index: it {what}. Make one with: edgelm index build BUNDLE DATA -o INDEX"
        ) from error
    except OSError as error:
        raise BinaryIndexError(f"Cannot read {path}: {error.strerror}.") from error
    try:
        data = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BinaryIndexError(_damaged(path)) from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BinaryIndexError(f"{path} is not the manifest of an edgelm index.")
    version = data.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise BinaryIndexError(
            f"{index} has index format {version}; this edgelm reads up to {FORMAT_VERSION}. "
            "Update edgelm on this device, or build the index again with this version."
        )
    digest = data.pop("digest", None)
    if digest != _digest(data) or raw != _canonical({**data, "digest": digest}):
        raise BinaryIndexError(_damaged(path))
    for key in ("format", "format_version"):
        data.pop(key)
    return schema.build(IndexManifest, data, str(path), BinaryIndexError, extra=True)


def write_manifest(index: Path, manifest: IndexManifest) -> None:
    """Replace an index's manifest; when this returns, it is on the disk.

    Raises:
        OSError: It cannot be written; the old one is still there.
    """
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **schema.plain(manifest),
    }
    fresh = index / f"{MANIFEST}.new"
    with fresh.open("wb") as stream:
        stream.write(_canonical({**data, "digest": _digest(data)}))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, index / MANIFEST)
    sync_folder(index)


def sync_folder(path: Path) -> None:
    """Put a folder's names on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damaged(path: Path) -> str:
    return f"{path} is damaged: its digest is not that of its content. Copy the index again, or build it again."


def _digest(data: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(data)).hexdigest()


def _canonical(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode()
