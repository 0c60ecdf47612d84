"""BinaryIndex: binary codes on the disk, searched where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

import edgelm
from edgelm.atomic import new_folder
from edgelm.errors import BinaryIndexError, InputError
from edgelm.runtimes.engine import cores
from edgelm.runtimes.index.approximate import AUTOMATIC_ROWS, Lists, build_lists
from edgelm.runtimes.index.checks import check_floats
from edgelm.runtimes.index.files import create_files
from edgelm.runtimes.index.manifest import (
    MANIFEST,
    EncoderInfo,
    IndexManifest,
    VectorType,
    write_manifest,
)
from edgelm.runtimes.index.search import (
    CANDIDATES,
    OVERSAMPLE,
    Rows,
    Scores,
    search_rows,
)
from edgelm.runtimes.index.snapshot import LISTS, open_snapshot
from edgelm.runtimes.index.writer import Writer
from edgelm.runtimes.rescoring import pack_vectors

_MAX_BITS = 8192


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: Its id.
        score: Larger is nearer: how many bits are equal, for a code; the asymmetric
            score, for a float query; the dot product, for a vector.
        text: What was kept with it; empty if nothing was.
    """

    id: str
    score: float
    text: str


class BinaryIndex:
    """An index, opened: what it held at that moment, until `refresh`.

    Any number of processes may have it open while one of them changes it.

    Attributes:
        path: Its folder.
    """

    def __init__(self, path: str | Path) -> None:
        """Open an index; maps its files without reading them.

        Raises:
            BinaryIndexError: It is no index, damaged, or too new.
        """
        self.path = Path(path)
        self.refresh()

    @classmethod
    def create(
        cls,
        path: str | Path,
        bits: int,
        *,
        encoder: EncoderInfo | None = None,
        vectors: VectorType | None = None,
        dimension: int = 0,
        factors: bool = False,
        force: bool = False,
    ) -> BinaryIndex:
        """Make an empty index.

        Args:
            path: The folder to make.
            bits: Width of a code, a multiple of 8.
            encoder: What makes the codes.
            vectors: Store a vector with every code, of this type.
            dimension: Length of a vector.
            factors: Store a factor for asymmetric scores with every code.
            force: Replace an index that is there already.

        Raises:
            InputError: ``bits`` or ``dimension`` is out of range.
            OutputExistsError: ``path`` is there already.
        """
        if bits % 8 or not 8 <= bits <= _MAX_BITS:
            raise InputError(
                f"The width of a code must be a multiple of 8 from 8 to {_MAX_BITS} bits. Got {bits}."
            )
        if (vectors is not None) != (dimension > 0):
            raise InputError(
                "Give the type of the vectors and their dimension, or neither."
            )
        manifest = IndexManifest(
            created_by=f"edgelm {edgelm.__version__}",
            bits=bits,
            encoder=encoder,
            vectors=vectors,
            dimension=dimension,
            factors=factors,
        )
        with new_folder(Path(path), marker=MANIFEST, force=force) as work:
            files = create_files(work / manifest.folder, manifest)
            write_manifest(work, replace(manifest, files=files))
        return cls(path)

    def __len__(self) -> int:
        """Rows that can be found."""
        return len(self._snapshot)

    @property
    def manifest(self) -> IndexManifest:
        """What is known of the index."""
        return self._snapshot.manifest

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.manifest.bits

    def path_of(self, name: str) -> Path:
        """Where an attached file is (`Writer.attach`).

        Raises:
            KeyError: The index has no such file.
        """
        if name not in self.manifest.files:
            raise KeyError(name)
        return self._snapshot.path(name)

    def texts(self) -> list[str]:
        """What is kept with each row, deleted rows included, in the order of adding.

        Raises:
            BinaryIndexError: A record is damaged.
        """
        return [text for _, text in self._snapshot.read(np.arange(self.manifest.rows))]

    def refresh(self) -> None:
        """See what has been added and deleted since the index was opened."""
        # Taken first: what changes while the files are mapped shows at the next look.
        self._stamp = _stamp(self.path)
        self._snapshot = open_snapshot(self.path)
        self._lists: Lists | None = None

    def is_current(self) -> bool:
        """Whether nothing was added or deleted since, by any process; looks at one file's times, reads nothing.

        An index that is gone meanwhile, as while it is replaced, is what it was.
        """
        return _stamp(self.path) in (self._stamp, None)

    def check_encoder(self, encoder: EncoderInfo) -> None:
        """Refuse an encoder that did not make the codes of this index.

        Raises:
            BinaryIndexError: The encoder is another one, or it is not known which made the codes.
        """
        made_by = self.manifest.encoder
        if made_by is None:
            raise BinaryIndexError(
                f"{self.path} does not say which encoder made its codes. Build it from a bundle."
            )
        if made_by.digest != encoder.digest:
            raise BinaryIndexError(
                f"The codes of {self.path} were made by {made_by.name} ({made_by.digest[:12]}), "
                f"not by {encoder.name} ({encoder.digest[:12]}). Use that bundle, or build the index again."
            )

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises:
            BinaryIndexError: A file is damaged; the message says which.
        """
        self._snapshot.verify()

    def writer(self) -> Writer:
        """Take the lock, for many batches; use it in a ``with`` statement, and `refresh` after it.

        Raises:
            BinaryIndexError: Another process changes the index, or it cannot be written.
        """
        return Writer(self.path)

    def add(
        self,
        ids: Sequence[str],
        codes: NDArray[np.uint8],
        *,
        texts: Sequence[str] | None = None,
        vectors: NDArray[np.float32] | None = None,
        factors: NDArray[np.float16] | None = None,
        replace: bool = False,
    ) -> None:
        """Add rows, all or none; when this returns they are on the disk.

        Args:
            ids: Their ids.
            codes: uint8 ``[n, bits / 8]``.
            texts: What to keep with each.
            vectors: float32 ``[n, dimension]``, where the index stores vectors.
            factors: float16 ``[n]``, where the index has factors.
            replace: Take the place of rows that have these ids, instead of refusing them.

        Raises:
            InputError: Something does not fit the index, or an id is there already.
            BinaryIndexError: Another process changes the index, or it cannot be written; nothing was added.
        """
        with self.writer() as writer:
            writer.add(
                ids,
                codes,
                texts=texts,
                vectors=self.pack(vectors),
                factors=factors,
                replace_existing=replace,
            )
        self.refresh()

    def pack(self, vectors: NDArray[np.float32] | None) -> NDArray[Any] | None:
        """Vectors, float32 ``[n, dimension]``, as this index stores them.

        Raises:
            InputError: They have another shape, or values that cannot be stored.
        """
        kind = self.manifest.vectors
        if vectors is None:
            return None
        if kind is None:
            raise InputError(f"{self.path} stores no vectors. Leave them out.")
        check_floats(vectors, self.manifest.dimension, "vectors")
        return pack_vectors(vectors, kind)

    def delete(self, ids: Sequence[str]) -> None:
        """Delete rows, all or none; when this returns, they stay deleted.

        Raises:
            InputError: An id is not in the index.
            BinaryIndexError: Another process changes the index, or it cannot be written; nothing was deleted.
        """
        with self.writer() as writer:
            writer.delete(ids)
        self.refresh()

    def compact(self, approximate: Literal["auto", "always", "never"] = "auto") -> None:
        """Write the files anew without deleted rows; make inverted lists where they pay.

        Args:
            approximate: Whether to make inverted lists; ``auto`` goes by the number of rows.

        Raises:
            BinaryIndexError: A file is damaged, or there is no room; the index is as it was.
            MissingExtraError: Lists are wanted and faiss is not installed.
        """
        with self.writer() as writer:
            writer.compact()
        self.refresh()
        if approximate != "never":
            self.make_lists(always=approximate == "always")

    def make_lists(self, *, always: bool = False) -> None:
        """Make inverted lists over all rows, where there are enough of them or ``always``.

        Raises:
            BinaryIndexError: Another process changes the index, or there is no room.
            MissingExtraError: faiss is not installed.
        """
        with self.writer() as writer:
            if always or writer.manifest.rows >= AUTOMATIC_ROWS:
                fresh = self.path / f"{LISTS}.new"
                about = build_lists(open_snapshot(self.path), fresh)
                if about is not None:
                    writer.attach(LISTS, fresh, approximate=about)
        self.refresh()

    def search(
        self,
        queries: NDArray[Any],
        k: int = 10,
        *,
        shortlist: NDArray[np.uint8] | None = None,
        vectors: NDArray[np.float32] | None = None,
        candidates: int = CANDIDATES,
        oversample: int = OVERSAMPLE,
        exact: bool = False,
        threads: int | None = None,
    ) -> list[list[Hit]]:
        """Find the nearest rows of each query; as `search_rows`, with ids and texts.

        Raises:
            InputError: The queries do not fit the index.
            BinaryIndexError: A record is damaged.
        """
        rows, scores = self.search_rows(
            queries,
            k,
            shortlist=shortlist,
            vectors=vectors,
            candidates=candidates,
            oversample=oversample,
            exact=exact,
            threads=threads,
        )
        records = iter(self._snapshot.read(rows.ravel()))
        # A row of scores that has ended takes no further record.
        return [
            [
                Hit(name, score, text)
                for score, (name, text) in zip(its_scores, records, strict=False)
            ]
            for its_scores in scores.tolist()
        ]

    def search_rows(
        self,
        queries: NDArray[Any],
        k: int = 10,
        *,
        shortlist: NDArray[np.uint8] | None = None,
        vectors: NDArray[np.float32] | None = None,
        candidates: int = CANDIDATES,
        oversample: int = OVERSAMPLE,
        exact: bool = False,
        threads: int | None = None,
    ) -> tuple[Rows, Scores]:
        """Find the nearest rows of each query.

        Codes are compared by Hamming distance. A float query is compared with the
        ``candidates * k`` codes nearest to its own code; with ``vectors``, the best
        ``oversample * k`` of these, or without a float query the nearest, are compared with
        the vectors stored.

        Args:
            queries: Codes, uint8 ``[q, bits / 8]``, or float rows, float32 ``[q, bits]``.
            k: How many rows to find; fewer where the index holds fewer.
            shortlist: uint8 ``[q, bits / 8]``: codes of float queries; their signs if not given.
            vectors: float32 ``[q, dimension]``: the queries' vectors.
            candidates: Codes a hit that a float query is compared with.
            oversample: Vectors a hit that are read.
            exact: Scan all codes, where inverted lists would be used otherwise.
            threads: Threads to use; the cores if not given.

        Returns:
            Rows, int64, and scores, float32, ``[q, min(k, rows)]``, best first; the lower row first among equals.

        Raises:
            InputError: The queries do not fit the index, or a number is less than 1.
        """
        return search_rows(
            self._snapshot,
            None if exact else self._open_lists(),
            queries,
            k,
            shortlist=shortlist,
            vectors=vectors,
            candidates=candidates,
            oversample=oversample,
            threads=threads or cores(),
        )

    def _open_lists(self) -> Lists | None:
        about = self.manifest.approximate
        if about is not None and self._lists is None:
            try:
                self._lists = Lists(self._snapshot, about)
            except FileNotFoundError:  # compacted since: all codes are still mapped
                return None
        return self._lists


def _stamp(index: Path) -> tuple[int, ...] | None:
    """Changes with every batch, which replaces the manifest; None where there is none."""
    try:
        found = (index / MANIFEST).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
