"""What an index holds at one moment, memory-mapped; later batches do not show in it."""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from edgelm.errors import BinaryIndexError
from edgelm.runtimes.index.manifest import IndexManifest, read_manifest

CODES, ROWS, RECORDS, DELETED = "codes", "rows", "records", "deleted"
FACTORS, VECTORS, LISTS = "factors", "vectors", "lists"

# A row's key (of its id) and where its record ends; it begins where the last one ends.
ROW = np.dtype([("key", "<u8"), ("end", "<u8")])
# CRC-32 of what follows, length of the id in bytes; then the id and the text, UTF-8.
_HEAD = struct.Struct("<II")
_BLOCK = 1 << 20


def columns(manifest: IndexManifest) -> dict[str, np.dtype[Any]]:
    """Name to type of a row, of every file that has one row a code."""
    found: dict[str, np.dtype[Any]] = {
        CODES: np.dtype(("u1", (manifest.bits // 8,))),
        ROWS: ROW,
    }
    if manifest.factors:
        found[FACTORS] = np.dtype("<f2")
    if manifest.vectors == "float16":
        found[VECTORS] = np.dtype(("<f2", (manifest.dimension,)))
    elif manifest.vectors == "int8":
        found[VECTORS] = np.dtype(
            [("scale", "<f4"), ("values", "i1", (manifest.dimension,))]
        )
    return found


def pack_record(name: str, text: str) -> bytes:
    """An id and its text as a record."""
    encoded = name.encode()
    body = encoded + text.encode()
    length = struct.pack("<I", len(encoded))
    return struct.pack("<I", zlib.crc32(length + body)) + length + body


class Snapshot:
    """An index at one moment.

    Attributes:
        index: The index's folder.
        manifest: Its manifest at that moment.
        codes: uint8 ``[rows, bits / 8]``, mapped; as all below, in the order of adding.
        factors: float16 ``[rows]``, mapped, or None.
        vectors: ``[rows]`` as `columns` says, mapped, or None.
        deleted: int64, sorted: rows that count no more.
    """

    def __init__(self, index: Path, manifest: IndexManifest) -> None:
        """Map the files; reads none of them but the list of deleted rows.

        Raises:
            BinaryIndexError: A file is shorter than the manifest says, or the list
                of deleted rows is damaged.
            FileNotFoundError: A file is not there.
        """
        self.index, self.manifest = index, manifest
        layout = columns(manifest)
        for name, dtype in layout.items():
            if manifest.files[name].size != manifest.rows * dtype.itemsize:
                raise BinaryIndexError(f"The manifest of {index} contradicts itself.")
        mapped = {
            name: _array(self._map(name), dtype, manifest.rows)
            for name, dtype in layout.items()
        }
        self.codes: NDArray[np.uint8] = mapped[CODES]
        self.factors: NDArray[np.float16] | None = mapped.get(FACTORS)
        self.vectors: NDArray[Any] | None = mapped.get(VECTORS)
        self._rows, self._records = mapped[ROWS], self._map(RECORDS)
        if LISTS in manifest.files:
            self._map(LISTS)  # its size is checked
        gone = self._map(DELETED)
        if zlib.crc32(gone) != manifest.files[DELETED].crc32:
            raise BinaryIndexError(_damaged(self.path(DELETED)))
        self.deleted = np.sort(np.frombuffer(gone, "<i8"))

    def __len__(self) -> int:
        """Rows that count."""
        return self.manifest.rows - len(self.deleted)

    @property
    def keys(self) -> NDArray[np.uint64]:
        """uint64 ``[rows]``: the key of every row's id."""
        keys: NDArray[np.uint64] = self._rows["key"]
        return keys

    def path(self, name: str) -> Path:
        """Path of one of its files."""
        return self.index / self.manifest.folder / name

    def is_deleted(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some rows count no more."""
        at = np.searchsorted(self.deleted, rows)
        found = np.zeros(rows.shape, bool)
        inside = at < len(self.deleted)
        found[inside] = self.deleted[at[inside]] == rows[inside]
        return found

    def read(self, rows: NDArray[np.int64]) -> list[tuple[str, str]]:
        """Ids and texts of some rows, int64 ``[n]``.

        Raises:
            BinaryIndexError: A record is damaged.
        """
        ends = self._rows["end"]
        begins = np.where(rows > 0, ends[np.maximum(rows, 1) - 1], 0).tolist()
        found = []
        for begin, end in zip(begins, ends[rows].tolist(), strict=True):
            raw = bytes(self._records[begin:end])
            crc, length = _HEAD.unpack_from(raw) if len(raw) >= _HEAD.size else (-1, 0)
            if zlib.crc32(raw[4:]) != crc:
                raise BinaryIndexError(_damaged(self.path(RECORDS)))
            body = raw[_HEAD.size :]
            found.append((body[:length].decode(), body[length:].decode()))
        return found

    def extents(self, begin: int, end: int) -> NDArray[np.int64]:
        """int64 ``[end - begin + 1]``: where the records of some rows begin, and where the last ends."""
        ends = self._rows["end"][begin:end].astype(np.int64)
        first = int(self._rows["end"][begin - 1]) if begin else 0
        return np.concatenate([[first], ends])

    def records(self, begin: int, end: int) -> bytes:
        """Bytes of the file of records."""
        return bytes(self._records[begin:end])

    def verify(self) -> None:
        """Read all and compare it with the checksums.

        Raises:
            BinaryIndexError: A file is damaged; the message says which.
        """
        for name, state in self.manifest.files.items():
            crc = 0
            for block in _blocks(self.path(name), state.size):
                crc = zlib.crc32(block, crc)
            if crc != state.crc32:
                raise BinaryIndexError(_damaged(self.path(name)))

    def _map(self, name: str) -> Any:
        """A file's bytes as far as they count."""
        size = self.manifest.files[name].size
        with self.path(name).open("rb") as stream:
            there = stream.seek(0, 2)
            if there < size:
                raise BinaryIndexError(
                    f"{self.path(name)} is truncated: it has {there} bytes instead of {size}. "
                    "Copy the index again, or build it again."
                )
            if size == 0:  # cannot be mapped
                return b""
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
        if name in (VECTORS, RECORDS) and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)  # single rows are read: nothing ahead
        return mapped


def open_snapshot(index: Path) -> Snapshot:
    """Map an index as it is now, also while another process compacts it.

    Raises:
        BinaryIndexError: It is no index, damaged, or too new.
    """
    manifest = read_manifest(index)
    while True:
        try:
            return Snapshot(index, manifest)
        except OSError as error:
            # Compaction removes the old folder once the manifest names the new one.
            latest = read_manifest(index)
            if latest.epoch == manifest.epoch:
                raise BinaryIndexError(
                    f"Cannot read {error.filename}: {error.strerror}. Copy the index again, or build it again."
                ) from error
            manifest = latest
        except KeyError as error:
            raise BinaryIndexError(
                f"The manifest of {index} does not list the file {error}."
            ) from error


def _array(buffer: Any, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    return np.ndarray((rows,), dtype, buffer=buffer) if rows else empty(0, dtype)


def empty(rows: int, dtype: DTypeLike) -> NDArray[Any]:
    """An array of rows of a type that may hold arrays itself."""
    return np.empty((rows,), dtype)


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while size and (block := stream.read(min(_BLOCK, size))):
            size -= len(block)
            yield block


def _damaged(path: Path) -> str:
    return f"{path} is damaged: its checksum is not the manifest's. Copy the index again, or build it again."
