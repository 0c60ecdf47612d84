"""The files of an index: made, appended to, and copied without deleted rows."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgelm.runtimes.index.manifest import FileState, IndexManifest
from edgelm.runtimes.index.snapshot import (
    CODES,
    DELETED,
    FACTORS,
    LISTS,
    RECORDS,
    ROW,
    ROWS,
    VECTORS,
    Snapshot,
    columns,
)

# Rows that are copied at once.
_CHUNK = 1 << 16


def create_files(folder: Path, manifest: IndexManifest) -> dict[str, FileState]:
    """Make a folder with the empty files of an index."""
    folder.mkdir()
    names = [*columns(manifest), RECORDS, DELETED]
    for name in names:
        (folder / name).touch()
    return dict.fromkeys(names, FileState())


def append(
    folder: Path, files: Mapping[str, FileState], appended: Mapping[str, bytes]
) -> dict[str, FileState]:
    """Write behind what counts in each file, and put it on the disk.

    Args:
        folder: Where the files are.
        files: How much of each counts.
        appended: What to write behind that, for some of them.

    Returns:
        The states that the files have if this is to count.

    Raises:
        OSError: It cannot be written.
    """
    states = dict(files)
    for name, data in appended.items():
        if data:
            state = states[name]
            _write(folder / name, state.size, data)
            crc = zlib.crc32(data, state.crc32)
            states[name] = FileState(state.size + len(data), crc)
    return states


def copy_live_rows(
    old: Snapshot, fresh: IndexManifest, folder: Path
) -> dict[str, FileState]:
    """Write the rows of a snapshot that are not deleted, in their order, into a new folder.

    Raises:
        OSError: There is no room.
    """
    files = create_files(folder, fresh)
    columns_of = {CODES: old.codes, FACTORS: old.factors, VECTORS: old.vectors}
    for begin in range(0, old.manifest.rows, _CHUNK):
        end = min(begin + _CHUNK, old.manifest.rows)
        live = ~old.is_deleted(np.arange(begin, end))
        extents = old.extents(begin, end)
        rows = np.empty(int(live.sum()), ROW)
        rows["key"] = old.keys[begin:end][live]
        rows["end"] = np.cumsum(np.diff(extents)[live]) + files[RECORDS].size
        appended = {
            name: array[begin:end][live].tobytes()
            for name, array in columns_of.items()
            if array is not None
        }
        appended[ROWS] = rows.tobytes()
        appended[RECORDS] = b"".join(
            old.records(extents[i], extents[i + 1]) for i in np.flatnonzero(live)
        )
        files = append(folder, files, appended)
    return files


def copy_attached(old: Snapshot, folder: Path) -> dict[str, FileState]:
    """Copy what was attached to a snapshot and does not depend on its rows: all but the lists.

    Raises:
        OSError: There is no room.
    """
    known = {*columns(old.manifest), RECORDS, DELETED, LISTS}
    states = {n: s for n, s in old.manifest.files.items() if n not in known}
    for name, state in states.items():
        (folder / name).touch()
        _write(folder / name, 0, old.path(name).read_bytes()[: state.size])
    return states


def _write(path: Path, offset: int, data: bytes) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        view = memoryview(data)
        while view:
            written = os.pwrite(handle, view, offset)
            view, offset = view[written:], offset + written
        os.fsync(handle)
    finally:
        os.close(handle)
