"""What a writer puts into the files, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.index.keys import id_keys
from edgelm.runtimes.index.manifest import IndexManifest
from edgelm.runtimes.index.snapshot import CODES, pack_record


def check_column(
    name: str,
    rows: Any,
    dtype: np.dtype[Any],
    count: int,
    manifest: IndexManifest,
) -> NDArray[Any]:
    """Rows to append to a file, or an error that says what does not fit."""
    if rows is None:
        raise InputError(f"This index needs {name} with every code. Give them.")
    rows = np.asarray(rows)
    if rows.shape[:1] != (count,):
        raise InputError(
            f"There are {count} ids but {name} of shape {list(rows.shape)}."
        )
    if name == CODES:
        check_codes(rows, manifest.bits)
    elif (rows.dtype, rows.shape[1:]) != (dtype.base, dtype.shape):
        raise InputError(
            f"This index holds {name} of type {dtype}. Got {rows.dtype} {list(rows.shape)} instead."
        )
    checked: NDArray[Any] = rows
    return checked


def check_codes(codes: NDArray[Any], bits: int) -> None:
    """Raise `InputError` if an array does not hold codes of so many bits."""
    if codes.ndim != 2 or codes.dtype != np.uint8:
        raise InputError(
            f"Codes are uint8 [n, {bits // 8}], packed by numpy.packbits. "
            f"Got {codes.dtype} {list(codes.shape)} instead."
        )
    if codes.shape[1] * 8 != bits:
        raise InputError(
            f"This index holds codes of {bits} bits. Got codes of {codes.shape[1] * 8} bits."
        )


def check_ids(ids: Sequence[str]) -> NDArray[np.uint64]:
    """Keys of a batch's ids.

    Raises:
        InputError: An id is no string, empty, not Unicode, or there twice.
    """
    seen: set[str] = set()
    for name in ids:
        if not isinstance(name, str) or not name:
            raise InputError(f"An id is a string that is not empty. Got {name!r}.")
        if name in seen:
            raise InputError(f"The id {name!r} is given twice in one batch.")
        seen.add(name)
    try:
        return id_keys(ids)
    except UnicodeEncodeError as error:
        raise InputError(f"The id {error.object!r} is not valid Unicode.") from error


def check_records(ids: Sequence[str], texts: Sequence[str] | None) -> list[bytes]:
    """Records of a batch's ids and texts.

    Raises:
        InputError: There are more or fewer texts than ids, or a text is not Unicode.
    """
    if texts is None:
        texts = [""] * len(ids)
    if len(texts) != len(ids):
        raise InputError(f"There are {len(ids)} ids but {len(texts)} texts.")
    records = []
    for name, text in zip(ids, texts, strict=True):
        try:
            records.append(pack_record(name, text))
        except UnicodeEncodeError as error:
            raise InputError(f"The text of {name!r} is not valid Unicode.") from error
    return records


def check_floats(values: NDArray[Any], width: int, what: str) -> None:
    """Raise `InputError` if an array is not float32 ``[n, width]``, or not finite."""
    if values.ndim != 2 or values.shape[1] != width or values.dtype != np.float32:
        raise InputError(
            f"This index takes {what} as float32 [n, {width}]. Got {values.dtype} {list(values.shape)} instead."
        )
    if not np.isfinite(values).all():
        raise InputError(f"The {what} hold a value that is not finite.")
