"""From ids to rows, for writers: sorted runs that are merged as they grow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray


def id_keys(ids: Sequence[str]) -> NDArray[np.uint64]:
    """64-bit keys of ids (BLAKE2b); different ids may share one, so compare the ids too."""
    digests = (hashlib.blake2b(i.encode(), digest_size=8).digest() for i in ids)
    return np.frombuffer(b"".join(digests), "<u8")


class KeyMap:
    """Keys to rows, 16 bytes a row, a logarithmic number of sorted runs.

    A run is merged into the one before it when it is at least half as long, so
    that n keys in any number of batches cost O(n log n) and a look-up is a few
    binary searches.
    """

    def __init__(self, keys: NDArray[np.uint64], rows: NDArray[np.int64]) -> None:
        """Begin with some rows (int64) and their keys (uint64), in any order."""
        self._runs: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        self.add(keys, rows)

    def add(self, keys: NDArray[np.uint64], rows: NDArray[np.int64]) -> None:
        """Take in more rows."""
        runs = [*self._runs, (keys, rows)]
        while len(runs) > 1 and len(runs[-2][0]) <= 2 * len(runs[-1][0]):
            (keys, rows), (more, their) = runs[-2:]
            runs[-2:] = [(np.concatenate([keys, more]), np.concatenate([rows, their]))]
        keys, rows = runs[-1]
        order = np.argsort(keys, kind="stable")
        runs[-1] = (keys[order], rows[order])
        self._runs = runs

    def find(self, keys: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
        """Position among ``keys`` and row, of every row that has one of the keys."""
        for sorted_keys, rows in self._runs:
            begin = np.searchsorted(sorted_keys, keys, "left")
            end = np.searchsorted(sorted_keys, keys, "right")
            for i in np.flatnonzero(end > begin):
                for row in rows[begin[i] : end[i]]:
                    if row >= 0:
                        yield int(i), int(row)

    def remove(self, keys: NDArray[np.uint64], rows: NDArray[np.int64]) -> None:
        """Forget rows, whose keys are given."""
        gone = set(rows.tolist())
        for sorted_keys, kept in self._runs:
            begin = np.searchsorted(sorted_keys, keys, "left")
            end = np.searchsorted(sorted_keys, keys, "right")
            for low, high in zip(begin, end, strict=True):
                for at in range(low, high):
                    if int(kept[at]) in gone:
                        kept[at] = -1
