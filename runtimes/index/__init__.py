"""Search by binary codes: an index on the disk that is mapped, not loaded.

>>> from edgelm import BinaryIndex
>>> index = BinaryIndex.create("index", bits=256)
>>> index.add(["a", "b"], codes)  # uint8 [2, 32], as numpy.packbits packs
>>> index.search(queries, k=1)  # [[Hit(id='b', score=231.0, text='')]]
"""

from __future__ import annotations

from edgelm.runtimes.index.binary_index import BinaryIndex, Hit
from edgelm.runtimes.index.manifest import EncoderInfo
from edgelm.runtimes.index.writer import Writer

__all__ = ["BinaryIndex", "EncoderInfo", "Hit", "Writer"]
