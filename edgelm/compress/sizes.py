"""Honest sizes: zeros alone make no file smaller; what would, and by how much."""

from __future__ import annotations

import torch

from edgelm.errors import require


def sizes(weight: torch.Tensor) -> dict[str, int]:
    """Bytes of a weight, stored in three ways.

    Args:
        weight: Any shape and dtype, on the CPU.

    Returns:
        ``dense``: as it lies in a file. ``bitmask``: a bit for every weight, and the
        non-zeros. ``zstd``: the dense bytes compressed at zstandard's default level.
    """
    zstandard = require("zstandard", "compress")
    raw = weight.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    left = int(weight.count_nonzero())
    return {
        "dense": len(raw),
        "bitmask": -(-weight.numel() // 8) + left * weight.element_size(),
        "zstd": len(zstandard.ZstdCompressor().compress(raw)),
    }
