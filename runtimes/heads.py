"""Heads: a linear layer on the vectors that a graph gives, applied in numpy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edgelm.bundle import Bundle
from edgelm.errors import BundleError
from edgelm.manifest import HeadInfo, NerInfo, ScoringInfo

FORMAT, FORMAT_VERSION = "edgelm-head", "1"
# Features -> how many times the dimension of a vector there are.
PARTS = {"text": 1, "token": 1, "pair": 2, "ordered-pair": 4}
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """A linear layer: ``features @ weight + bias``.

    Attributes:
        features: As `edgelm.manifest.HeadInfo` names them.
        weight: float32 ``[parts * dim, labels]``.
        bias: float32 ``[labels]``.
    """

    features: str
    weight: Floats
    bias: Floats

    def logits(self, first: Floats, second: Floats | None = None) -> Floats:
        """Apply the head.

        Args:
            first: float32 ``[n, dim]``.
            second: The same of the second texts, where the head is one of pairs.

        Returns:
            float32 ``[n, labels]``.
        """
        rows = first if second is None else pair_features(first, second, self.features)
        result: Floats = rows @ self.weight + self.bias
        return result


def pair_features(first: Floats, second: Floats, features: str) -> Floats:
    """What a head sees of two texts: ``|u - v|`` and ``u * v``; in an ordered pair before them ``u`` and ``v``.

    They are those that InferSent classifies pairs by (Conneau et al. 2017, section 3.1).

    Args:
        first: ``[n, dim]``.
        second: ``[n, dim]``.
        features: ``pair`` or ``ordered-pair``.

    Returns:
        ``[n, 2 * dim]`` or ``[n, 4 * dim]``.
    """
    own = [first, second] if features == "ordered-pair" else []
    both: Floats = np.concatenate(
        [*own, np.abs(first - second), first * second], axis=1
    )
    return both


def open_heads(bundle: Bundle) -> tuple[Head | None, dict[str, Head]]:
    """The weights of a bundle's head, if it has one, and those of its named heads.

    Raises:
        BundleError: One cannot be read, or is not what the manifest says.
    """
    manifest = bundle.manifest
    dimension = manifest.embedding.dimension if manifest.embedding else 0
    head = None
    if manifest.head is not None:
        info = manifest.ner or manifest.scoring
        head = _open(bundle, manifest.head, info, dimension)
    if (manifest.task == "multi") != bool(manifest.heads):
        raise BundleError(
            f"The manifest of {bundle.name} does not say which heads it has."
        )
    named = {}
    for name, one in manifest.heads.items():
        labels = one.ner if one.task == "ner" else one.scoring
        if labels is None:
            raise BundleError(f"The head {name} of {bundle.name} has no labels.")
        if one.head is not None:
            named[name] = _open(bundle, one.head, labels, dimension)
    return head, named


def _open(
    bundle: Bundle, info: HeadInfo, labels: NerInfo | ScoringInfo | None, dimension: int
) -> Head:
    head = load_head(bundle.file(info.file), info.features)
    due = (dimension * PARTS[info.features], len(labels.labels) if labels else 0)
    if head.weight.shape != due:
        raise BundleError(
            f"The head of {bundle.name} is not the one that its manifest describes. Fit it again."
        )
    return head


def save_head(head: Head, path: Path) -> None:
    """Write a head's weights; the manifest says what they are applied to."""
    arrays = {"weight": head.weight, "bias": head.bias}
    save_file(
        {name: np.ascontiguousarray(a, np.float32) for name, a in arrays.items()},
        path,
        {"format": FORMAT, "version": FORMAT_VERSION},
    )


def load_head(path: Path, features: str) -> Head:
    """Read a head.

    Raises:
        BundleError: It is none, a newer one, or holds a number that is not finite.
    """
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise BundleError(f"{path} is not a head of edgelm.")
            if about.get("version") != FORMAT_VERSION:
                raise BundleError(
                    f"{path} has version {about.get('version')}; this edgelm reads version {FORMAT_VERSION}. "
                    "Update edgelm."
                )
            weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
    except SafetensorError as error:
        raise BundleError(f"{path} cannot be read: {error}.") from error
    arrays = (weight, bias)
    fits = weight.ndim == 2 and bias.shape == weight.shape[1:]
    if not fits or any(a.dtype != np.float32 for a in arrays):
        raise BundleError(f"{path} does not hold a weight and its bias in float32.")
    if not all(np.isfinite(a).all() for a in arrays):
        raise BundleError(f"{path} holds numbers that are not finite. Fit it again.")
    return Head(features, weight, bias)
