"""The first bytes of a TensorRT plan, read without TensorRT.

A plan begins with 28 bytes: the tag 0x74727466, the version of the format (0), and in the last four the version of
TensorRT that wrote it (github.com/NVIDIA/TensorRT, samples/common/sampleEngines.cpp).
"""

from __future__ import annotations

import struct
from pathlib import Path

from edgelm.errors import SessionError

TAG = 0x74727466
SIZE = 28


def plan_version(path: Path) -> str:
    """The version of TensorRT that wrote a plan, for example ``"10.3.0.30"``.

    Raises:
        SessionError: The file is no plan of a TensorRT that is known.
    """
    with path.open("rb") as stream:
        head = stream.read(SIZE)
    if len(head) < SIZE:
        raise SessionError(f"{path} is no TensorRT plan: it has {len(head)} bytes.")
    tag, layout = struct.unpack_from("<II", head)
    if tag != TAG or layout != 0:
        raise SessionError(
            f"{path} is no TensorRT plan: it begins with {head[:8].hex(' ')}."
        )
    return ".".join(str(byte) for byte in head[24:28])
