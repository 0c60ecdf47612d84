"""Binary codes of raw text by a Paragraph Vector: no transformer, numpy alone.

A text is the counts of its words and pairs of neighbouring words. Its code is the
string of bits that makes these most likely, found by gradient descent with the
model's term vectors as they are. `edgelm.codes.paragraph` trains the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgelm.errors import BundleError, InputError

FORMAT, FORMAT_VERSION = "edgelm-paragraph", 1
ABOUT, ARRAYS = "paragraph.json", "paragraph.safetensors"
# A word: letters and digits, with apostrophes inside.
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
# Texts that are worked on at once; bounds memory, not results.
_ROWS = 128

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Counts:
    """How often each term is in each text, as compressed sparse rows.

    Attributes:
        starts: int64 ``[n + 1]``; the entries of text i are ``starts[i]:starts[i + 1]``.
        terms: int64 ``[entries]``, term numbers, ascending within a text.
        values: float32 ``[entries]``, occurrences.
    """

    starts: NDArray[np.int64]
    terms: NDArray[np.int64]
    values: Floats

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.starts) - 1

    def rows(self, chosen: NDArray[np.int64]) -> Counts:
        """The counts of some texts, in the order given."""
        sizes = np.diff(self.starts)[chosen]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        entries = np.arange(starts[-1]) + np.repeat(
            self.starts[chosen] - starts[:-1], sizes
        )
        return Counts(starts, self.terms[entries], self.values[entries])


@dataclass(frozen=True)
class Vocabulary:
    """The terms that a model knows: words, then pairs of neighbouring words.

    Attributes:
        words: Lower-case words; word i is term i.
        pairs: int32 ``[pairs, 2]``, words by number, sorted; pair i is term
            ``len(words) + i``.
    """

    words: tuple[str, ...]
    pairs: NDArray[np.int32]

    def __len__(self) -> int:
        """Number of terms."""
        return len(self.words) + len(self.pairs)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Word to term."""
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def _keys(self) -> NDArray[np.int64]:
        left, right = self.pairs.astype(np.int64).T
        keys: NDArray[np.int64] = left * len(self.words) + right
        return keys

    def counts(self, texts: Iterable[str]) -> Counts:
        """Count the known terms of texts; others are passed over."""
        ids, text_of, count = self.numbered(texts)
        where, keys = neighbours(ids, text_of, len(self.words))
        at = np.minimum(np.searchsorted(self._keys, keys), max(len(self.pairs) - 1, 0))
        known = self._keys[at] == keys if len(self.pairs) else np.zeros(len(at), bool)
        terms = np.concatenate([ids[ids >= 0], len(self.words) + at[known]])
        text_of = np.concatenate([text_of[ids >= 0], text_of[where[known]]])
        entries, values = np.unique(text_of * len(self) + terms, return_counts=True)
        rows, terms = np.divmod(entries, len(self))
        starts = np.searchsorted(rows, np.arange(count + 1))
        return Counts(starts, terms, values.astype(np.float32))

    def numbered(
        self, texts: Iterable[str]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """All words of texts in a row, as numbers (-1: unknown); the text of each; how many texts."""
        find = self.numbers.get
        per_text = [[find(word, -1) for word in split_words(text)] for text in texts]
        sizes = [len(found) for found in per_text]
        ids = np.fromiter((i for found in per_text for i in found), np.int64)
        return ids, np.repeat(np.arange(len(sizes)), sizes), len(sizes)


def split_words(text: str) -> list[str]:
    """Lower-case words of a text; punctuation separates them and is dropped."""
    return _WORD.findall(text.lower())


def neighbours(
    ids: NDArray[np.int64], text_of: NDArray[np.int64], words: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places where a known word is followed by another in the same text, and a key of each such pair."""
    left, right = ids[:-1], ids[1:]
    where = np.flatnonzero((left >= 0) & (right >= 0) & (text_of[:-1] == text_of[1:]))
    return where, left[where] * words + right[where]


@dataclass(frozen=True)
class ParagraphCoder:
    """Maps texts to binary codes, and with a projection to real vectors too.

    ``p(term | text) = softmax(vectors @ bits + bias)``; the bits are
    ``sigmoid(h) >= 1/2``, with ``h`` a free row for each text or, with a projection
    (Real-Binary), ``h = row @ projection``. The row is found by Adam, with
    the gradient of the sigmoid in place of that of the rounding.

    Attributes:
        vocabulary: The terms.
        vectors: float32 ``[terms, bits]``.
        bias: float32 ``[terms]``.
        weights: float32 ``[terms]``: how much an occurrence counts; frequent terms less.
        projection: float32 ``[dim, bits]``; None: the row is of ``bits`` numbers itself.
        steps: Steps of descent for a text.
        rate: Length of the first step; it falls to 0 linearly.
    """

    vocabulary: Vocabulary
    vectors: Floats
    bias: Floats
    weights: Floats
    projection: Floats | None
    steps: int
    rate: float

    @property
    def bits(self) -> int:
        """Length of a code."""
        return int(self.vectors.shape[1])

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all that decides on a code."""
        return _digest(*_pack(self))

    def encode(self, texts: Sequence[str]) -> NDArray[np.uint8]:
        """Codes of texts.

        Returns:
            uint8 ``[n, bits // 8]``, as `numpy.packbits` packs.

        Raises:
            InputError: A text has no term that the model knows.
        """
        return self.encode_with_vectors(texts)[0]

    def encode_with_vectors(
        self, texts: Sequence[str]
    ) -> tuple[NDArray[np.uint8], Floats]:
        """Codes and real vectors of texts.

        Returns:
            uint8 ``[n, bits // 8]``, and float32 ``[n, dim]`` of length 1: the
            rows that the bits come from.

        Raises:
            InputError: A text has no term that the model knows.
        """
        counts = self.vocabulary.counts(texts)
        unknown = np.flatnonzero(np.diff(counts.starts) == 0)
        if len(unknown):
            raise InputError(
                f"Text {unknown[0] + 1} of {len(texts)} has no word that the model knows: "
                f"{texts[unknown[0]][:40]!r}. Remove it, or train on text like it."
            )
        codes = np.zeros((len(texts), self.bits // 8), np.uint8)
        width = self.bits if self.projection is None else len(self.projection)
        rows = np.zeros((len(texts), width), np.float32)
        for first in range(0, len(texts), _ROWS):
            part = np.arange(first, min(first + _ROWS, len(texts)))
            rows[part], bits = self.infer(counts.rows(part))
            codes[part] = np.packbits(bits, axis=1)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        vectors: Floats = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
        return codes, vectors

    def infer(self, counts: Counts) -> tuple[Floats, NDArray[np.bool_]]:
        """Find the rows and bits of texts: the softmax is over all terms, exactly.

        Args:
            counts: Of some texts; each has at least one term.

        Returns:
            float32 ``[n, dim]`` and bool ``[n, bits]``.
        """
        entries = counts.values * self.weights[counts.terms]
        sums = np.add.reduceat(
            self.vectors[counts.terms] * entries[:, None], counts.starts[:-1]
        )
        totals = np.add.reduceat(entries, counts.starts[:-1])[:, None]
        # Of the mean negative log-likelihood of a term.
        pull: Floats = (sums / totals).astype(np.float32)
        through = self.projection
        rows = np.zeros(
            (len(counts), self.bits if through is None else len(through)), np.float32
        )
        mean, square = np.zeros_like(rows), np.zeros_like(rows)
        for step in range(1, self.steps + 1):
            inner = rows if through is None else rows @ through
            soft: Floats = (0.5 + 0.5 * np.tanh(inner / 2)).astype(np.float32)
            likely = (inner >= 0).astype(np.float32) @ self.vectors.T + self.bias
            likely -= likely.max(axis=1, keepdims=True)
            np.exp(likely, out=likely)
            likely /= likely.sum(axis=1, keepdims=True)
            gradient = (likely @ self.vectors - pull) * soft * (1 - soft)
            if through is not None:
                gradient = gradient @ through.T
            mean += 0.1 * (gradient - mean)
            square += 0.001 * (gradient**2 - square)
            rate = self.rate * (1 - (step - 1) / self.steps)
            scaled = mean / (1 - 0.9**step)
            rows -= (
                np.float32(rate)
                * scaled
                / (np.sqrt(square / (1 - 0.999**step)) + np.float32(1e-8))
            )
        return rows, (rows if through is None else rows @ through) >= 0


def save_paragraph_coder(coder: ParagraphCoder, folder: Path) -> None:
    """Write a coder's two files into a folder that is there."""
    about, arrays = _pack(coder)
    about["digest"] = _digest(about, arrays)
    (folder / ARRAYS).write_bytes(save(arrays))
    text = json.dumps(about, ensure_ascii=False, indent=1)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")


def load_paragraph_coder(folder: Path) -> ParagraphCoder:
    """Read a coder.

    Raises:
        BundleError: A file is missing or damaged, is no Paragraph Vector, or of a newer version.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        arrays = load((folder / ARRAYS).read_bytes())
    except OSError as error:
        raise BundleError(
            f"{folder} cannot be read as a Paragraph Vector: {error.strerror}: {error.filename}."
        ) from error
    except (ValueError, SafetensorError) as error:
        raise BundleError(f"{folder} is damaged: {error}. Copy it again.") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise BundleError(f"{folder} is not a Paragraph Vector of edgelm.")
    if about.get("version") != FORMAT_VERSION:
        raise BundleError(
            f"{folder} has version {about.get('version')}; this edgelm reads version {FORMAT_VERSION}. Update edgelm."
        )
    digest = about.pop("digest", None)
    # What a digest vouches for was written by `save_paragraph_coder`.
    if digest != _digest(about, arrays):
        raise BundleError(
            f"{folder} is damaged: its content has another digest than when it was written. Copy it again."
        )
    return ParagraphCoder(
        vocabulary=Vocabulary(tuple(about["words"]), arrays["pairs"]),
        vectors=arrays["vectors"],
        bias=arrays["bias"],
        weights=arrays["weights"],
        projection=arrays.get("projection"),
        steps=about["steps"],
        rate=about["rate"],
    )


def _pack(coder: ParagraphCoder) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """What goes into the JSON file, and what into the safetensors file."""
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "bits": coder.bits,
        "steps": coder.steps,
        "rate": coder.rate,
        "words": list(coder.vocabulary.words),
    }
    arrays: dict[str, NDArray[Any]] = {
        "pairs": coder.vocabulary.pairs,
        "vectors": coder.vectors,
        "bias": coder.bias,
        "weights": coder.weights,
    }
    if coder.projection is not None:
        arrays["projection"] = coder.projection
    return about, {k: np.ascontiguousarray(v) for k, v in arrays.items()}


def _digest(about: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
