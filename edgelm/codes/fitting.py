"""From embeddings to a coder. A kind is a function of centred embeddings; KINDS names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.codes.config import BinaryCodes
from edgelm.errors import CompressionError
from edgelm.runtimes.codes import Coder, Floats, sign, signs

Doubles = NDArray[np.float64]
# Sweeps over the codes in each round of fitting.
_SWEEPS = 2


def fit(vectors: Floats, config: BinaryCodes) -> Coder:
    """Fit a coder.

    Args:
        vectors: float ``[n, dim]``, embeddings like those that will be encoded; some
            thousands are enough.
        config: What codes to make.

    Returns:
        The coder; the same for the same input, up to rounding.

    Raises:
        CompressionError: The embeddings are no matrix of finite numbers, are all alike, or have
            fewer dimensions than a kind without projection needs.
    """
    vectors = np.asarray(vectors, np.float32)
    if vectors.ndim != 2 or not np.isfinite(vectors).all():
        raise CompressionError("Codes are fitted to finite embeddings, [n, dim].")
    if len(vectors) < 2 or not np.ptp(vectors, axis=0).any():
        raise CompressionError(
            f"Codes cannot be fitted to {len(vectors)} embeddings that are all alike. Give more and different texts."
        )
    mean = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    if config.kind == "sign":
        mean = np.zeros_like(mean)
    return KINDS[config.kind](mean, vectors - mean, config)


def _coordinates(mean: Floats, centred: Floats, config: BinaryCodes) -> Coder:
    """The first ``bits`` dimensions as they are."""
    dimension = centred.shape[1]
    if config.bits > dimension:
        raise CompressionError(
            f"The kind '{config.kind}' gives a bit a dimension, at most {dimension} here; "
            f"{config.bits} were asked for. Use rotation, itq, projection or autoencoder."
        )
    return _symmetric(mean, centred, np.eye(dimension, config.bits))


def _rotation(mean: Floats, centred: Floats, config: BinaryCodes) -> Coder:
    """A random rotation, or for more bits than dimensions a random tight frame (SimHash, Charikar 2002)."""
    return _symmetric(mean, centred, _frame(centred.shape[1], config))


def _itq(mean: Floats, centred: Floats, config: BinaryCodes) -> Coder:
    return _symmetric(mean, centred, optimised_rotation(centred, config))


def _autoencoder(mean: Floats, centred: Floats, config: BinaryCodes) -> Coder:
    """Codes that a linear decoder makes the embeddings of, found for each document by descent."""
    start = _symmetric(mean, centred, optimised_rotation(centred, config))
    decoder, _ = fit_decoder(start, centred, config)
    return replace(start, decoder=decoder, sweeps=config.sweeps)


def _projection(mean: Floats, centred: Floats, config: BinaryCodes) -> Coder:
    """The autoencoder's codes as a linear projection gives them best (least squares)."""
    start = _symmetric(mean, centred, optimised_rotation(centred, config))
    _, found = fit_decoder(start, centred, config)
    gram = centred.T.astype(np.float64) @ centred / len(centred)
    # A thousandth of the mean variance: directions that the texts hardly have are noise.
    gram[np.diag_indices_from(gram)] += 1e-3 * np.trace(gram) / len(gram)
    encoder = np.linalg.solve(gram, centred.T.astype(np.float64) @ found / len(centred))
    return _symmetric(mean, centred, encoder)


KINDS: dict[str, Callable[[Floats, Floats, BinaryCodes], Coder]] = {
    "sign": _coordinates,
    "centred": _coordinates,
    "rotation": _rotation,
    "itq": _itq,
    "projection": _projection,
    "autoencoder": _autoencoder,
}


def optimised_rotation(centred: Floats, config: BinaryCodes) -> Doubles:
    """Principal axes, rotated so that signs change them least.

    Iterative quantisation (Gong and Lazebnik, CVPR 2011, section 3.2): ``B = sign(V R)``, then
    ``R`` by the singular vectors of ``V.T B``, by turns. Deviation: for more bits than
    dimensions ``R`` is a tight frame, ``[dim, bits]`` with orthonormal rows, by the same step.

    Args:
        centred: float32 ``[n, dim]``, mean 0.
        config: ``bits``, ``iterations``, ``seed``.

    Returns:
        ``[dim, bits]``.
    """
    data = centred.astype(np.float64)
    variances, axes = np.linalg.eigh(data.T @ data / len(data))
    kept = min(config.bits, len(variances))
    axes = axes[:, np.argsort(-variances)[:kept]]
    # A vector and its negative are both eigenvectors: choose by rule, not by library.
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.sign(axes[largest, np.arange(kept)])
    values = (data @ axes).astype(np.float32)
    rotation = _frame(kept, config)
    for _ in range(config.iterations):
        codes = sign(values @ rotation.astype(np.float32))
        left, _, right = np.linalg.svd(
            (values.T @ codes).astype(np.float64), full_matrices=False
        )
        rotation = left @ right
    product: Doubles = axes @ rotation
    return product


def fit_decoder(
    coder: Coder, centred: Floats, config: BinaryCodes
) -> tuple[Floats, Floats]:
    """Codes and a linear decoder, fitted to each other by turns.

    ``min |x - D b|^2`` over ``D`` by ridge regression, then over each ``b`` by descent
    (binary autoencoder, Carreira-Perpinan and Raziperchikolaei, CVPR 2015, without its
    penalty: the encoder only gives the start of the descent).

    Args:
        coder: Where to begin.
        centred: float32 ``[n, dim]``, mean 0.
        config: ``rounds`` and ``ridge``.

    Returns:
        Decoder, float32 ``[dim, bits]``, and the codes, float32 ``[n, bits]`` of -1 and +1.
    """
    flat = replace(coder, mean=np.zeros_like(coder.mean))
    codes = signs(flat.encode(centred), coder.bits)
    decoder = _decoder(centred, codes, config.ridge)
    for _ in range(config.rounds):
        step = replace(flat, decoder=decoder, sweeps=_SWEEPS)
        codes = step.improve(centred, codes)
        decoder = _decoder(centred, codes, config.ridge)
    return decoder, codes


def _decoder(centred: Floats, codes: Floats, ridge: float) -> Floats:
    gram = (codes.T @ codes).astype(np.float64) / len(codes)
    gram[np.diag_indices_from(gram)] += ridge
    cross = (codes.T @ centred).astype(np.float64) / len(codes)
    return np.ascontiguousarray(np.linalg.solve(gram, cross).T, np.float32)


def _symmetric(mean: Floats, centred: Floats, encoder: Any) -> Coder:
    """A coder whose decoder is its encoder, times what brings decoded embeddings nearest."""
    encoder = np.ascontiguousarray(encoder, np.float32)
    values = centred @ encoder
    decoded = sign(values) @ encoder.T
    scale = float(np.sum(centred * decoded) / np.sum(decoded * decoded))
    return Coder(mean, encoder, np.float32(scale) * encoder)


def _frame(dimension: int, config: BinaryCodes) -> Doubles:
    """Random, ``[dimension, bits]``: orthonormal columns, or rows where there are more bits."""
    draw = np.random.default_rng(config.seed)
    size = max(dimension, config.bits)
    basis, triangle = np.linalg.qr(draw.standard_normal((size, size)))
    # Signs of the triangle make the rotation uniform (Mezzadri 2007) and the same everywhere.
    basis = basis * np.sign(np.diag(triangle))
    frame: Doubles = basis[:dimension, : config.bits]
    return frame
