"""Lines of the files that people give: UTF-8, plain or packed, texts or JSON."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from edgelm.errors import InputError, require

_CHUNK = 1 << 16


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, through gzip or zstd where its name says so.

    Raises:
        InputError: It cannot be opened; or, while it is read, it is damaged or ends early.
        MissingExtraError: It is ``.zst`` and zstandard is not installed.
    """
    damage: type[Exception] = zlib.error
    if path.suffix == ".zst":
        damage = require("zstandard", "compress").ZstdError
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    if path.suffix == ".gz":
        return io.BufferedReader(_Unpacked(path, stream, _gunzip(stream), damage))
    if path.suffix == ".zst":
        return io.BufferedReader(_Unpacked(path, stream, _unzstd(stream), damage))
    return stream


def _gunzip(stream: IO[bytes]) -> Iterator[bytes]:
    with gzip.open(stream) as unpacked:
        while chunk := unpacked.read(_CHUNK):
            yield chunk


def _unzstd(stream: IO[bytes]) -> Iterator[bytes]:
    """Frame after frame; zstandard's own reader stops at the first end without a word."""
    import zstandard

    frame = None
    while chunk := stream.read(_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise EOFError("it ends early")


class _Unpacked(io.RawIOBase):
    """What is in a packed file; damage is an `InputError` wherever it is met."""

    def __init__(
        self,
        path: Path,
        packed: IO[bytes],
        chunks: Iterator[bytes],
        damage: type[Exception],
    ) -> None:
        self._path, self._packed, self._damage = path, packed, damage
        self._chunks, self._rest = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._rest:
                self._rest = next(self._chunks)
        except StopIteration:
            return 0
        except (OSError, EOFError, self._damage) as error:
            raise InputError(
                f"{self._path} is damaged, cut short or no {self._path.suffix} file: {error}."
            ) from error
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def close(self) -> None:
        self._packed.close()
        super().close()


def numbered_lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Decoded lines without their ends, each with its number, from 1.

    Args:
        stream: Binary stream.
        name: How to name it in an error.

    Raises:
        InputError: A line is not UTF-8; the message names the line.
    """
    for number, line in enumerate(stream, 1):
        yield number, decode(line, f"{name}, line {number}").rstrip("\r\n")


def read_json_lines(stream: IO[bytes], name: str) -> Iterator[Any]:
    """Parse a stream of JSON lines; empty lines are passed over.

    Args:
        stream: Binary stream.
        name: How to name it in an error.

    Raises:
        InputError: A line is not UTF-8 or not JSON; the message names the line.
    """
    return (row for _, row in numbered_json_lines(stream, name))


def numbered_json_lines(stream: IO[bytes], name: str) -> Iterator[tuple[int, Any]]:
    """As `read_json_lines`, each with its line's number, from 1."""
    for number, line in numbered_lines(stream, name):
        if text := line.strip():
            yield number, parse_json(text, f"{name}, line {number}")


def decode(line: bytes, where: str) -> str:
    """Decode UTF-8; a byte order mark at the beginning is no text.

    Raises:
        InputError: It is not UTF-8; the message says where.
    """
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte 0x{line[error.start]:02x} at position {error.start + 1} is not UTF-8. "
            "Convert the text to UTF-8 first, for example with iconv."
        ) from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON whose strings are Unicode.

    Raises:
        InputError: It is not JSON, or a string in it holds half of a surrogate pair, which is
            no character.
    """
    try:
        row = json.loads(text)
        if "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except RecursionError as error:
        raise InputError(f"{where}: not JSON (nested too deeply).") from error
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: a string holds half of a surrogate pair, which is no character. Remove it."
        ) from error
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise InputError(f"{where}: not JSON ({error}).") from error
    return row
