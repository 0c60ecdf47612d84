"""Smaller vectors: fewer dimensions, one byte or one bit a number."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgelm.errors import BundleError, InputError

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ranges:
    """Least and greatest value of each dimension, between which bytes are spread evenly.

    Attributes:
        low: float32 ``[dim]``.
        high: float32 ``[dim]``.
    """

    low: Floats
    high: Floats

    @classmethod
    def of(cls, vectors: Floats) -> Ranges:
        """Those of vectors, ``[n, dim]``.

        Raises:
            InputError: There are none.
        """
        if not len(vectors):
            raise InputError("Ranges need at least one text.")
        return cls(vectors.min(axis=0), vectors.max(axis=0))

    @property
    def step(self) -> Floats:
        """What one step of a byte stands for, ``[dim]``; 1 where all values are the same."""
        steps: Floats = (self.high - self.low) / np.float32(255)
        return np.where(steps > 0, steps, np.float32(1))

    def quantize(self, vectors: Floats) -> NDArray[np.uint8]:
        """The nearest of 256 values of each dimension; what lies outside becomes the nearest end.

        Args:
            vectors: float32 ``[n, dim]``.

        Returns:
            uint8 ``[n, dim]``; less 128 it is the int8 code.

        Raises:
            InputError: The ranges are of another dimension.
        """
        if vectors.shape[1:] != self.low.shape:
            raise InputError(
                f"The ranges are of {len(self.low)} dimensions, the vectors have {vectors.shape[1]}. "
                "Take them of such vectors: embedder.calibrate(texts, dimensions=...)."
            )
        codes: NDArray[np.uint8] = np.clip(
            np.rint((vectors - self.low) / self.step), 0, 255
        ).astype(np.uint8)
        return codes

    def restore(self, codes: NDArray[Any]) -> Floats:
        """About the vectors that codes were made of.

        Args:
            codes: uint8 or int8 ``[n, dim]``.

        Returns:
            float32 ``[n, dim]``, within half a step of what lay within the ranges.
        """
        shift = np.float32(128 if codes.dtype == np.int8 else 0)
        values: Floats = (codes.astype(np.float32) + shift) * self.step + self.low
        return values

    def save(self, path: Path) -> None:
        """Write them to a safetensors file."""
        save_file({"low": self.low, "high": self.high}, path)

    @classmethod
    def load(cls, path: Path, dimension: int) -> Ranges:
        """Read them.

        Raises:
            BundleError: They are not such ranges.
        """
        try:
            arrays = load_file(path)
            low, high = arrays["low"], arrays["high"]
        except (SafetensorError, KeyError) as error:
            raise BundleError(f"{path} cannot be read: {error}.") from error
        if low.shape != (dimension,) or high.shape != (dimension,):
            raise BundleError(
                f"{path} does not hold ranges of {dimension} dimensions. Export the bundle again."
            )
        return cls(low, high)


def given_ranges(ranges: Ranges | tuple[ArrayLike, ArrayLike]) -> Ranges:
    """Ranges from what a caller gave: ranges, or the least and the greatest values.

    Raises:
        InputError: They are not two rows of numbers, or a least value is above its greatest.
    """
    if isinstance(ranges, Ranges):
        return ranges
    low, high = (np.asarray(row, np.float32) for row in ranges)
    if low.ndim != 1 or low.shape != high.shape or not (low <= high).all():
        raise InputError(
            "Ranges must be the least and the greatest value of each dimension."
        )
    return Ranges(low, high)


def signs(vectors: Floats) -> NDArray[np.uint8]:
    """One bit a dimension: whether it is above 0, packed as `numpy.packbits` packs; uint8 ``[n, ceil(dim / 8)]``."""
    return np.packbits(vectors > 0, axis=1)


def shorten(vectors: Floats, dimensions: int, *, normalize: bool) -> Floats:
    """The first dimensions of each vector, of length 1 again where asked for.

    Kusupati et al. 2022, Matryoshka Representation Learning.
    """
    short = vectors[:, :dimensions]
    return unit(short) if normalize else np.ascontiguousarray(short)


def unit(vectors: Floats) -> Floats:
    """Vectors of length 1; zeros stay zeros."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    scaled: Floats = vectors / np.maximum(lengths, np.float32(1e-12))
    return scaled
