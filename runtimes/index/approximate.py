"""Inverted lists for large indexes: a part of the codes is scanned instead of all of them.

They are faiss's IndexBinaryIVF, in a file that is mapped. How many lists a query needs is measured on the
codes themselves when the lists are made; where no small number finds nearly all neighbours (random codes
have no neighbourhoods), there are no lists, and the search stays exact.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import BinaryIndexError, require
from edgelm.runtimes.index.manifest import Approximate
from edgelm.runtimes.index.scan import Nearest, merge, nearest
from edgelm.runtimes.index.snapshot import LISTS, Snapshot

# From here on lists are tried: a scan of everything takes some 5 ms and more on a
# server's core (1.3 ms a million codes of 256 bits, benchmarks/retrieval.py).
AUTOMATIC_ROWS = 4_000_000
RECALL = 0.99
_NEIGHBOURS, _SAMPLE = 10, 200
_POINTS_PER_LIST, _ITERATIONS = 50, 5
_CHUNK = 1 << 17


def build_lists(snapshot: Snapshot, path: Path, *, seed: int = 0) -> Approximate | None:
    """Cluster the codes and write the lists.

    Args:
        snapshot: The index.
        path: File to write.
        seed: Of the samples that are clustered and searched for.

    Returns:
        What was made, or None, and no file, where a sixteenth of the lists does not
        hold 99 % of the ten nearest.
    """
    faiss = require("faiss", "index")
    codes, rows = snapshot.codes, snapshot.manifest.rows
    lists = min(2 * math.isqrt(rows), rows // _POINTS_PER_LIST)
    if lists < 2:
        return None
    random = np.random.default_rng(seed)
    bits = snapshot.manifest.bits
    index = faiss.IndexBinaryIVF(faiss.IndexBinaryFlat(bits), bits, lists)
    index.cp.niter, index.cp.seed = _ITERATIONS, seed
    index.cp.max_points_per_centroid = _POINTS_PER_LIST
    sample = random.choice(rows, min(rows, lists * _POINTS_PER_LIST), replace=False)
    index.train(codes[np.sort(sample)])
    for begin in range(0, rows, _CHUNK):
        index.add(np.ascontiguousarray(codes[begin : begin + _CHUNK]))
    # A row finds itself whatever the lists: it is asked for its other neighbours.
    asked = random.choice(rows, min(rows, _SAMPLE), replace=False)
    k = _NEIGHBOURS + 1
    exact, _ = nearest(codes[asked], codes, k)
    probes, recall = 1, 0.0
    while probes <= max(1, lists // 16):
        index.nprobe = probes
        found, _ = index.search(codes[asked], k)
        recall = float((found <= exact[:, -1:])[:, 1:].mean())
        if recall >= RECALL:
            faiss.write_index_binary(index, str(path))
            return Approximate(rows, lists, probes, round(recall, 4))
        probes *= 2
    return None


class Lists:
    """The inverted lists of an index, mapped."""

    def __init__(self, snapshot: Snapshot, about: Approximate) -> None:
        """Map the lists of a snapshot.

        Raises:
            BinaryIndexError: faiss cannot read them.
            OSError: They are not there any more.
            MissingExtraError: faiss is not installed.
        """
        faiss = require("faiss", "index")
        path = snapshot.path(LISTS)
        path.stat()
        self._snapshot, self._rows = snapshot, about.rows
        try:
            self._index: Any = faiss.read_index_binary(str(path), faiss.IO_FLAG_MMAP)
        except RuntimeError as error:
            raise BinaryIndexError(
                f"{path} is damaged: faiss cannot read it. Make it again with: edgelm index compact INDEX"
            ) from error
        if (self._index.d, self._index.ntotal) != (
            snapshot.manifest.bits,
            about.rows,
        ):
            raise BinaryIndexError(
                f"{path} is not of this index. Make it again with: edgelm index compact INDEX"
            )
        self._index.nprobe = about.probes

    def nearest(self, queries: NDArray[np.uint8], k: int, threads: int = 1) -> Nearest:
        """As `scan.nearest`: nearly always the same rows, from a part of the codes."""
        faiss = require("faiss", "index")
        codes, width = self._snapshot.codes, min(k, self._rows)
        before = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(threads)
        try:
            distances, rows = self._index.search(queries, width)
        finally:
            faiss.omp_set_num_threads(before)
        # The lists that were searched may hold fewer than k.
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):
            found = nearest(queries[short], codes[: self._rows], width, threads)
            distances[short], rows[short] = found
        late = nearest(queries, codes[self._rows :], k, threads)
        return merge([(distances, rows), (late[0], late[1] + self._rows)], k)
