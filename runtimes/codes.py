"""Binary codes: embeddings to packed bits, and how codes are scored. numpy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgelm.errors import BundleError, InputError

MIN_BITS, MAX_BITS = 32, 1024
FORMAT, FORMAT_VERSION = "edgelm-coder", "1"
# Bits that change at once while a code is improved are an eighth of it: as good as one
# by one (docs/codes.md), and matrix products instead of single steps.
GROUPS = 8
# Rows that are worked on at once; bounds memory, not results.
_ROWS = 4096

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Coder:
    """Maps float embeddings to binary codes.

    A document ``x`` has the code ``b`` in {-1, +1}^bits that a linear encoder gives,
    ``sign((x - mean) @ encoder)``, and that ``sweeps`` of bit flips then bring nearer to
    the least of ``|x - mean - decoder @ b|``. A float query ``q`` is scored against it by
    ``(q @ decoder) . b``, which is its dot product with the decoded document but for a
    number that is the same for all documents.

    Attributes:
        mean: float32 ``[dim]``, taken from embeddings before they are encoded.
        encoder: float32 ``[dim, bits]``.
        decoder: float32 ``[dim, bits]``.
        sweeps: How often every bit of a document's code is looked at again; 0 leaves
            the codes to the encoder.
    """

    mean: Floats
    encoder: Floats
    decoder: Floats
    sweeps: int = 0

    @property
    def bits(self) -> int:
        """Length of a code."""
        return int(self.encoder.shape[1])

    @property
    def dimension(self) -> int:
        """Length of an embedding."""
        return int(self.encoder.shape[0])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides on a code: what an index is tied to."""
        digest = hashlib.sha256(f"{self.dimension} {self.bits} {self.sweeps}".encode())
        for array in (self.mean, self.encoder, self.decoder):
            digest.update(np.ascontiguousarray(array, "<f4").tobytes())
        return digest.hexdigest()

    @cached_property
    def coupling(self) -> Floats:
        """What bits say about each other, float32 ``[bits, bits]``: ``decoder.T @ decoder`` with a zero diagonal."""
        gram = self.decoder.T @ self.decoder
        np.fill_diagonal(gram, 0.0)
        return gram

    def encode(self, vectors: Floats) -> Codes:
        """Codes of documents.

        A bit is 1 where its value is at least 0. Whether a value within rounding
        (about 1e-6) of 0 gives 0 or 1 can depend on the machine.

        Args:
            vectors: float ``[n, dim]``.

        Returns:
            uint8 ``[n, bits // 8]``, as `numpy.packbits` packs.

        Raises:
            InputError: Another shape, or a number that is not finite.
        """
        return self._encode(vectors, improved=self.sweeps > 0)

    def encode_queries(self, vectors: Floats) -> Codes:
        """Codes of queries for a search by Hamming distance: the encoder's, without sweeps.

        Arguments, result and errors are those of `encode`.
        """
        return self._encode(vectors, improved=False)

    def project(self, vectors: Floats) -> Floats:
        """Float rows of queries, for `asymmetric_scores`.

        Args:
            vectors: float ``[n, dim]``.

        Returns:
            float32 ``[n, bits]``.

        Raises:
            InputError: As for `encode`.
        """
        rows: Floats = self._check(vectors) @ self.decoder
        return rows

    def factors(
        self, vectors: Floats, codes: Codes, *, power: float = 0.5
    ) -> NDArray[np.float16]:
        """What to multiply the scores of each document by.

        Decoded documents are too short, each by another share. With the share
        ``c = <x, decoder @ b> / |x|^2`` of a centred document ``x``, ``1 / c`` makes the
        estimate of a dot product unbiased (RaBitQ, Gao and Long 2024, section 3.2, for
        random rotations). ``c ** -0.5`` leaves half of the bias and less noise, and ranks
        better at every width that was measured (docs/codes.md).

        Args:
            vectors: float ``[n, dim]``, the documents.
            codes: uint8 ``[n, bits // 8]``, their codes.
            power: 1 for the unbiased estimate.

        Returns:
            float16 ``[n]``, at most ``10 ** power``; 1 for a document at the mean.

        Raises:
            InputError: As for `encode`; or codes of another number or width.
        """
        centred = self._check(vectors) - self.mean
        _check_codes(codes, self.bits)
        if len(codes) != len(centred):
            raise InputError(
                f"There are {len(centred)} vectors and {len(codes)} codes; one for each is due."
            )
        found = np.ones(len(centred), np.float16)
        for rows in _slices(len(centred)):
            decoded = signs(codes[rows], self.bits) @ self.decoder.T
            lengths = np.sum(centred[rows] ** 2, axis=1)
            shares = np.sum(centred[rows] * decoded, axis=1)
            here = lengths > np.finfo(np.float32).tiny
            shares = np.maximum(shares[here] / lengths[here], 0.1)
            found[rows][here] = shares**-power
        return found

    def improve(self, centred: Floats, found: Floats) -> Floats:
        """Sweep over codes: each group of bits is set to what is best given all other bits.

        Least squares with binary unknowns by block coordinate descent, the bits of a block
        at once as if they did not depend on each other.

        Args:
            centred: float32 ``[n, dim]``, documents less the mean.
            found: float32 ``[n, bits]`` of -1 and +1, their codes.

        Returns:
            float32 ``[n, bits]``, better codes.
        """
        target = centred @ self.decoder
        size = self.bits // GROUPS
        found = found.copy()
        for _ in range(self.sweeps):
            for first in range(0, self.bits, size):
                group = slice(first, first + size)
                others = found @ self.coupling[:, group]
                found[:, group] = sign(target[:, group] - others)
        return found

    def _encode(self, vectors: Floats, *, improved: bool) -> Codes:
        vectors = self._check(vectors)
        codes = np.zeros((len(vectors), self.bits // 8), np.uint8)
        for rows in _slices(len(vectors)):
            centred = vectors[rows] - self.mean
            found = sign(centred @ self.encoder)
            if improved:
                found = self.improve(centred, found)
            codes[rows] = np.packbits(found > 0, axis=1)
        return codes

    def _check(self, vectors: Floats) -> Floats:
        vectors = np.asarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise InputError(
                f"Embeddings must be of shape [n, {self.dimension}], which this coder was fitted to. "
                f"Got {list(vectors.shape)} instead."
            )
        if not np.isfinite(vectors).all():
            raise InputError("Embeddings must be finite numbers.")
        return vectors


def sign(values: NDArray[np.floating]) -> Floats:
    """-1.0 or +1.0, float32; of 0 it is +1."""
    return np.where(values >= 0, np.float32(1), np.float32(-1))


def signs(codes: Codes, bits: int) -> Floats:
    """Packed codes, uint8 ``[n, bits // 8]``, as float32 ``[n, bits]`` of -1 and +1."""
    unpacked = np.unpackbits(codes, axis=1, count=bits).astype(np.float32)
    return unpacked * 2 - 1


def hamming_distances(queries: Codes, codes: Codes) -> NDArray[np.int32]:
    """Bits that differ.

    Args:
        queries: uint8 ``[q, bits // 8]``.
        codes: uint8 ``[n, bits // 8]``.

    Returns:
        int32 ``[q, n]``.

    Raises:
        InputError: The widths differ.
    """
    bits = queries.shape[1] * 8
    agreement = asymmetric_scores(signs(queries, bits), codes)
    # Sums of at most 1024 ones are exact in float32.
    distances: NDArray[np.int32] = ((bits - agreement) / 2).astype(np.int32)
    return distances


def asymmetric_scores(
    rows: Floats, codes: Codes, factors: NDArray[np.float16] | None = None
) -> Floats:
    """Scores of float queries against binary documents; larger is better.

    Args:
        rows: float32 ``[q, bits]``, of `Coder.project`.
        codes: uint8 ``[n, bits // 8]``.
        factors: float16 ``[n]``, of `Coder.factors`.

    Returns:
        float32 ``[q, n]``.

    Raises:
        InputError: Rows, codes and factors do not fit each other.
    """
    bits = rows.shape[1]
    _check_codes(codes, bits)
    if factors is not None and factors.shape != (len(codes),):
        raise InputError(
            f"There are {len(codes)} codes and factors of shape {list(factors.shape)}; one for each is due."
        )
    found = np.empty((len(rows), len(codes)), np.float32)
    for part in _slices(len(codes)):
        found[:, part] = rows @ signs(codes[part], bits).T
    return found if factors is None else found * factors.astype(np.float32)


def save_coder(coder: Coder, path: Path) -> None:
    """Write a coder: safetensors."""
    arrays = {name: getattr(coder, name) for name in ("mean", "encoder", "decoder")}
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "sweeps": str(coder.sweeps),
    }
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, path, about)


def load_coder(path: Path) -> Coder:
    """Read a coder.

    Raises:
        BundleError: The file is no coder, damaged, or of a newer version.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            names = set(file.keys())
            arrays = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read as a coder: {error}.") from error
    if about.get("format") != FORMAT or names != {"mean", "encoder", "decoder"}:
        raise BundleError(f"{path} is not a coder of edgelm.")
    if about.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{path} has version {about.get('version')}; this edgelm reads version {FORMAT_VERSION}. Update edgelm."
        )
    mean, encoder, decoder = arrays["mean"], arrays["encoder"], arrays["decoder"]
    fits = (
        encoder.ndim == 2
        and decoder.shape == encoder.shape
        and mean.shape == encoder.shape[:1]
        and is_width(encoder.shape[1])
        and about.get("sweeps", "").isdecimal()
        and all(a.dtype == np.float32 and np.isfinite(a).all() for a in arrays.values())
    )
    if not fits:
        raise BundleError(f"{path} is damaged: its arrays are not those of a coder.")
    return Coder(mean, encoder, decoder, int(about["sweeps"]))


def is_width(bits: int) -> bool:
    """Whether codes may have this many bits."""
    return MIN_BITS <= bits <= MAX_BITS and bits % 8 == 0


def _check_codes(codes: Codes, bits: int) -> None:
    if codes.ndim != 2 or codes.dtype != np.uint8 or codes.shape[1] * 8 != bits:
        raise InputError(
            f"Codes of {bits} bits must be uint8 of shape [n, {bits // 8}]. "
            f"Got {codes.dtype} of shape {list(codes.shape)} instead."
        )


def _slices(count: int) -> Iterator[slice]:
    return (slice(i, min(i + _ROWS, count)) for i in range(0, count, _ROWS))
