"""The one writer of an index: add, delete, compact; what is acknowledged stays.

A batch is written behind what counts, put on the disk (fsync), and then counts, all of it at once, when the
manifest is renamed into place. So whatever happens in between, a kill, a full disk, costs the batch in flight
and nothing else, and readers see it whole or not at all. `compact` writes a new folder of files and
swaps to it in the same way.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import BinaryIndexError, InputError
from edgelm.runtimes.index.checks import check_column, check_ids, check_records
from edgelm.runtimes.index.files import append, copy_attached, copy_live_rows
from edgelm.runtimes.index.keys import KeyMap
from edgelm.runtimes.index.manifest import (
    LOCK,
    FileState,
    IndexManifest,
    Progress,
    read_manifest,
    sync_folder,
    write_manifest,
)
from edgelm.runtimes.index.snapshot import (
    CODES,
    DELETED,
    FACTORS,
    RECORDS,
    ROW,
    ROWS,
    VECTORS,
    columns,
    open_snapshot,
)


class Writer:
    """Changes an index; there is one at a time, in this process or another.

    Attributes:
        index: The index's folder.
        manifest: What has been acknowledged.
    """

    def __init__(self, index: Path) -> None:
        """Take the lock, and clear away what an interrupted writer left.

        Raises:
            BinaryIndexError: Another process writes it, it cannot be written, it is
                no index, damaged, or too new.
        """
        self.index = index
        self._key_map: KeyMap | None = None
        read_manifest(index)  # nothing is written into a folder that is no index
        self._lock = _lock(index)
        try:
            self._reload()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        os.close(self._lock)

    def add(
        self,
        ids: Sequence[str],
        codes: NDArray[np.uint8],
        *,
        texts: Sequence[str] | None = None,
        vectors: NDArray[Any] | None = None,
        factors: NDArray[np.float16] | None = None,
        replace_existing: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Add rows; when this returns they are on the disk, all of them.

        Args:
            ids: Their ids.
            codes: uint8 ``[n, bits / 8]``, as numpy's ``packbits`` packs.
            texts: What to keep with each, if anything.
            vectors: ``[n]`` rows of the index's type of vectors.
            factors: float16 ``[n]``, where the index has factors.
            replace_existing: Rows that have one of the ids are deleted, in the
                same batch; else they are an error.
            progress: Of a build, to be acknowledged with the rows.

        Raises:
            InputError: Something does not fit the index, or an id is there already.
            BinaryIndexError: It cannot be written; nothing of the batch was kept.
        """
        given: dict[str, Any] = {CODES: codes, VECTORS: vectors, FACTORS: factors}
        appended = {
            name: check_column(name, given[name], dtype, len(ids), self.manifest)
            for name, dtype in columns(self.manifest).items()
            if name != ROWS
        }
        keys = check_ids(ids)
        known = self._rows_of(ids, keys)
        if known and not replace_existing:
            raise InputError(
                f"The index holds the id {ids[known[0][0]]!r} already. Delete it first, or replace it."
            )
        records = check_records(ids, texts)
        rows = np.empty(len(ids), ROW)
        rows["key"] = keys
        lengths = np.fromiter(map(len, records), np.uint64, len(records))
        rows["end"] = np.cumsum(lengths) + np.uint64(self.manifest.files[RECORDS].size)
        gone = np.array([row for _, row in known], "<i8")
        first = self.manifest.rows
        self._commit(
            {
                **{name: part.tobytes() for name, part in appended.items()},
                ROWS: rows.tobytes(),
                RECORDS: b"".join(records),
                DELETED: gone.tobytes(),
            },
            rows=first + len(ids),
            progress=progress or self.manifest.progress,
        )
        if known:
            self._keys().remove(keys[[i for i, _ in known]], gone)
        self._keys().add(keys, np.arange(first, first + len(ids)))

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows by their ids; when this returns, they stay deleted.

        Raises:
            InputError: An id is not in the index, or is given twice.
            BinaryIndexError: It cannot be written; nothing was deleted.
        """
        keys = check_ids(ids)
        known = self._rows_of(ids, keys)
        if len(known) != len(ids):
            missing = sorted(set(range(len(ids))) - {i for i, _ in known})
            raise InputError(
                f"The index holds no id {ids[missing[0]]!r}; nothing was deleted."
            )
        gone = np.array([row for _, row in known], "<i8")
        self._commit({DELETED: gone.tobytes()})
        self._keys().remove(keys[[i for i, _ in known]], gone)

    def compact(self) -> None:
        """Write the files anew without the deleted rows, in the same order, and swap to them.

        Every file is compared with its checksum first: damage is not copied.

        Raises:
            BinaryIndexError: A file is damaged, or there is no room; the index is as it was.
        """
        old = open_snapshot(self.index)
        old.verify()
        fresh = replace(
            self.manifest,
            generation=self.manifest.generation + 1,
            epoch=self.manifest.epoch + 1,
            rows=len(old),
            approximate=None,
        )
        folder = self.index / fresh.folder
        try:
            shutil.rmtree(folder, ignore_errors=True)
            files = copy_live_rows(old, fresh, folder) | copy_attached(old, folder)
            sync_folder(folder)
            self._swap(replace(fresh, files=files))
        except OSError as error:
            self._reload()
            raise BinaryIndexError(
                f"Cannot write to {self.index}: {error.strerror}. The index is as it was; make room and repeat."
            ) from error
        self._reload()

    def attach(self, name: str, path: Path, **changes: Any) -> None:
        """Move a finished file into the current folder and let it count.

        Args:
            name: Its name there.
            path: The file, on the same file system.
            changes: What else changes in the manifest.

        Raises:
            BinaryIndexError: There is no room; the index is as it was.
        """
        crc = size = 0
        folder = self.index / self.manifest.folder
        try:
            with path.open("rb") as stream:
                while block := stream.read(1 << 20):
                    crc, size = zlib.crc32(block, crc), size + len(block)
                os.fsync(stream.fileno())
            os.replace(path, folder / name)
            sync_folder(folder)
            files = {**self.manifest.files, name: FileState(size, crc)}
            generation = self.manifest.generation + 1
            self._swap(
                replace(self.manifest, files=files, generation=generation, **changes)
            )
        except OSError as error:
            self._reload()
            raise BinaryIndexError(
                f"Cannot write to {self.index}: {error.strerror}. The index is as it was; make room and repeat."
            ) from error

    def _keys(self) -> KeyMap:
        if self._key_map is None:
            snapshot = open_snapshot(self.index)
            rows = np.arange(self.manifest.rows)
            live = ~snapshot.is_deleted(rows)
            self._key_map = KeyMap(snapshot.keys[live], rows[live])
        return self._key_map

    def _rows_of(
        self, ids: Sequence[str], keys: NDArray[np.uint64]
    ) -> list[tuple[int, int]]:
        """Position among the ids and row, of every id that the index holds."""
        found = list(self._keys().find(keys))
        if not found:
            return []
        snapshot = open_snapshot(self.index)
        records = snapshot.read(np.array([row for _, row in found]))
        return sorted(
            (i, row)
            for (i, row), (name, _) in zip(found, records, strict=True)
            if name == ids[i]
        )

    def _commit(self, appended: Mapping[str, bytes], **changes: Any) -> None:
        """Append to files, then let it count."""
        folder = self.index / self.manifest.folder
        try:
            files = append(folder, self.manifest.files, appended)
            generation = self.manifest.generation + 1
            self._swap(
                replace(self.manifest, files=files, generation=generation, **changes)
            )
        except OSError as error:
            self._reload()
            raise BinaryIndexError(
                f"Cannot write to {self.index}: {error.strerror}. "
                "Nothing of this batch was kept; make room and repeat it."
            ) from error
        except BaseException:
            self._reload()
            raise

    def _swap(self, manifest: IndexManifest) -> None:
        write_manifest(self.index, manifest)
        self.manifest = manifest

    def _reload(self) -> None:
        """Go on from what is acknowledged; clear away what an interruption left."""
        self.manifest = read_manifest(self.index)
        self._key_map = None
        open_snapshot(self.index)  # raises where something acknowledged is missing
        current = self.index / self.manifest.folder
        for name, state in self.manifest.files.items():
            if (current / name).stat().st_size > state.size:
                os.truncate(current / name, state.size)
        for path in self.index.glob("data-*"):
            if path != current:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.index.glob("*.new"):
            path.unlink(missing_ok=True)


def _lock(index: Path) -> int:
    try:
        handle = os.open(index / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise BinaryIndexError(
            f"Cannot write to {index}: {error.strerror}. Open it for reading only, or mend its permissions."
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 20, 0).decode(errors="replace").strip()
        os.close(handle)
        raise BinaryIndexError(
            f"{index} is being changed by process {owner or '?'}. Wait until it is done."
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle
