"""Weights to whole numbers: a scale for each output, or for each block of one."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVELS = 127.0
# How often a step is fitted to its levels; more gains nothing.
_REFITS = 3


def rounded(x: NDArray[Any], step: Any) -> NDArray[Any]:
    """What symmetric int8 makes of ``x``; values beyond its range saturate."""
    near: NDArray[Any] = np.clip(np.rint(x / step), -LEVELS, LEVELS) * step
    return near


def quantise_weights(
    weights: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 for each output, at the step of least squared error.

    Args:
        weights: float32 ``[inputs, outputs]``.

    Returns:
        int8 ``[inputs, outputs]`` within -127 and 127, and the steps, float32 ``[outputs]``.
    """
    largest = np.abs(weights).max(0)
    # A column of zeros has any step; this one is a normal number in float16, too.
    largest = np.where(largest > 0, largest, 1.0).astype(np.float32)
    steps, least = largest / LEVELS, np.full(len(largest), np.inf)
    for cut in np.linspace(0.7, 1.0, 7):
        step = (largest * cut / LEVELS).astype(np.float32)
        error = np.square(rounded(weights, step) - weights).sum(0)
        better = error < least
        steps, least = np.where(better, step, steps), np.where(better, error, least)
    levels = np.clip(np.rint(weights / steps), -LEVELS, LEVELS)
    return levels.astype(np.int8), steps.astype(np.float32)


def quantise_blocks(
    weights: NDArray[np.float32],
    bits: int,
    block: int,
    stored: type[np.floating[Any]] = np.float32,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Symmetric whole numbers for each block of inputs, at the step of least squared error.

    From each of several first steps, levels and step are fitted to each other in turns.
    A step may be negative: the lowest level, ``-2 ** (bits - 1)``, has no counterpart above,
    and so falls to whichever end of the block is farther out.

    Args:
        weights: float32 ``[inputs, outputs]``.
        bits: 4 or 8.
        block: Inputs that share a step; the last block is filled up with zeros.
        stored: The type that steps are rounded to before levels are chosen.

    Returns:
        Levels plus ``2 ** (bits - 1)``, uint8 ``[outputs, blocks, block]``, and the
        steps, float32 ``[outputs, blocks]``.
    """
    inputs, outputs = weights.shape
    blocks = -(-inputs // block)
    rows = np.zeros((outputs, blocks * block), np.float32)
    rows[:, :inputs] = weights.T
    rows = rows.reshape(outputs, blocks, block)
    middle = 1 << (bits - 1)
    far = np.abs(rows).argmax(-1)[..., None]
    # The farthest value, with its sign; a block of zeros has any step.
    end = np.take_along_axis(rows, far, -1)
    end = np.where(end == 0, -1.0, end).astype(np.float32)
    steps, least = end / -middle, np.full(end.shape, np.inf)
    # Over -(middle - 1) a step is the usual symmetric one, whose ends are alike.
    for divisor in (-middle, -middle * 1.1, -middle * 1.2, -(middle - 1)):
        step = (end / divisor).astype(np.float32)
        for _ in range(_REFITS):
            levels = np.clip(np.rint(rows / step), -middle, middle - 1)
            error = np.square(levels * step - rows).sum(-1, keepdims=True)
            better = error < least
            steps, least = np.where(better, step, steps), np.where(better, error, least)
            # The best step for these levels, which may then no longer be the nearest.
            energy = np.square(levels).sum(-1, keepdims=True)
            fitted = (levels * rows).sum(-1, keepdims=True) / np.maximum(energy, 1.0)
            usable = np.abs(fitted) > np.abs(step) / 2
            step = np.where(usable, fitted, step).astype(np.float32)
    steps = steps.astype(stored)
    levels = np.clip(np.rint(rows / steps), -middle, middle - 1) + middle
    return levels.astype(np.uint8), steps[..., 0].astype(np.float32)


def pack(levels: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Levels as MatMulNBits reads them: of two 4-bit levels in a byte the first is the lower half.

    Args:
        levels: uint8 ``[outputs, blocks, block]``.
        bits: 4 or 8.

    Returns:
        uint8 ``[outputs, blocks, block * bits / 8]``.
    """
    if bits == 8:
        return levels
    return np.bitwise_or(levels[..., ::2], np.left_shift(levels[..., 1::2], 4)).astype(
        np.uint8
    )
