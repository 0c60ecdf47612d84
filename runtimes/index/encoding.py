"""From texts to codes and vectors, by the encoder of an index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.codes import Coder
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.index.manifest import EncoderInfo

Codes = NDArray[np.uint8]
Vectors = NDArray[np.float32]

# Names that models give to the prompts of the two sides; the first that a model has.
_QUERY, _DOCUMENT = ("query",), ("document", "passage", "corpus")


@dataclass(frozen=True)
class SignCoder:
    """A bit for the sign of every dimension."""

    bits: int
    digest: str = "sign"

    def encode(self, vectors: Vectors) -> Codes:
        """Codes, uint8 ``[n, bits / 8]``."""
        return np.packbits(vectors > 0, axis=1)

    encode_queries = encode

    def project(self, vectors: Vectors) -> Vectors:
        """The vectors themselves."""
        return vectors

    def factors(self, vectors: Vectors, codes: Codes) -> NDArray[np.float16]:
        """1 for each."""
        return np.ones(len(vectors), np.float16)


@dataclass(frozen=True)
class Documents:
    """Documents as an index takes them.

    Attributes:
        codes: uint8 ``[n, bits / 8]``.
        factors: float16 ``[n]``.
        vectors: float32 ``[n, dimension]``.
        truncated: bool ``[n]``: which were longer than the model takes.
    """

    codes: Codes
    factors: NDArray[np.float16]
    vectors: Vectors
    truncated: NDArray[np.bool_]


@dataclass(frozen=True)
class Queries:
    """Queries as a search takes them.

    Attributes:
        rows: float32 ``[n, bits]``.
        codes: uint8 ``[n, bits / 8]``: the codes for the shortlist.
        vectors: float32 ``[n, dimension]``.
    """

    rows: Vectors
    codes: Codes
    vectors: Vectors


class Encoder(Protocol):
    """What an index is built with.

    Attributes:
        bits: Width of its codes.
        dimension: Length of its vectors.
        info: What ties an index to it.
    """

    bits: int
    dimension: int
    info: EncoderInfo

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[Documents]:
        """Encode batches of documents, in order; batches may be taken ahead."""
        ...


def coder_of(embedder: Embedder) -> Coder | SignCoder:
    """What turns the vectors of an encoder into codes: its bundle's coder, else their signs.

    Raises:
        InputError: There is no coder, and the vectors' length is no multiple of 8.
    """
    if embedder.coder is not None:
        return embedder.coder
    if embedder.dimension % 8:
        raise InputError(
            f"{embedder.engine.name} gives vectors of {embedder.dimension} dimensions; "
            "codes of their signs need a multiple of 8."
        )
    return SignCoder(embedder.dimension)


class TextEncoder:
    """An embedding bundle as the encoder of an index.

    Attributes:
        bits: Width of its codes.
        dimension: Length of its vectors.
        info: What ties an index to it.
    """

    def __init__(self, embedder: Embedder) -> None:
        """Take an opened bundle."""
        self._embedder, self._coder = embedder, coder_of(embedder)
        self.bits, self.dimension = self._coder.bits, embedder.dimension
        manifest = embedder.engine.manifest
        parts = [
            manifest.files[manifest.graph.file].sha256,
            manifest.files[manifest.tokenizer.file].sha256,
            str(manifest.tokenizer.max_length),
            self._coder.digest,
        ]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        self.info = EncoderInfo(manifest.model.name, digest)

    def documents(self, texts: Sequence[str]) -> Documents:
        """Encode documents; what is longer than the model takes is cut."""
        vectors, cut = self._embedder.encode_with_truncation(
            texts, prompt=self._prompt(_DOCUMENT)
        )
        codes = self._coder.encode(vectors)
        return Documents(codes, self._coder.factors(vectors, codes), vectors, cut)

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[Documents]:
        """Encode batches of documents, one after the other."""
        return map(self.documents, batches)

    def queries(self, texts: Sequence[str], *, truncate: bool = False) -> Queries:
        """Encode queries.

        Args:
            texts: The queries.
            truncate: Cut what is longer than the model takes instead of refusing it.

        Raises:
            InputError: A query is longer than the model takes.
        """
        vectors, cut = self._embedder.encode_with_truncation(
            texts, prompt=self._prompt(_QUERY)
        )
        if cut.any() and not truncate:
            text = texts[int(cut.argmax())]
            limit = self._embedder.engine.manifest.tokenizer.max_length
            raise InputError(
                f"The query '{text[:40]}...' is longer than the {limit} tokens that the model takes. "
                "Shorten it, or let it be cut with --truncate."
            )
        coder = self._coder
        return Queries(coder.project(vectors), coder.encode_queries(vectors), vectors)

    def _prompt(self, names: Sequence[str]) -> str | None:
        return next((name for name in names if name in self._embedder.prompts), None)
