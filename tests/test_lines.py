"""Files as people have them: a byte order mark, damage, JSON that is none."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from edgelm.calibration import read_texts
from edgelm.errors import InputError
from edgelm.lines import numbered_lines, open_binary, parse_json

TEXT = "\ufefffirst\r\nzweiter Text mit Umlaut ü\r\n".encode()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_byte_order_mark_and_line_ends_are_no_text(
    tmp_path: Path, ending: str
) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[ending]
    path = tmp_path / f"texts.txt{ending}"
    path.write_bytes(pack(TEXT))
    assert list(read_texts(path)) == ["first", "zweiter Text mit Umlaut ü"]


def test_a_byte_order_mark_before_json(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "first"}\n')
    assert list(read_texts(path)) == ["first"]


def test_lines_are_numbered_with_the_empty_ones() -> None:
    found = numbered_lines(io.BytesIO(b"a\n\nb"), "data")
    assert list(found) == [(1, "a"), (2, ""), (3, "b")]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "other"])
def test_a_damaged_archive_is_named(tmp_path: Path, ending: str, damage: str) -> None:
    checked = zstandard.ZstdCompressor(write_checksum=True).compress
    pack = gzip.compress if ending == ".gz" else checked
    content = pack(b"".join(b"line %d\n" % i for i in range(20_000)))
    broken = {
        "cut": content[: len(content) // 2],
        "flipped": content[:99] + bytes([content[99] ^ 255]) + content[100:],
        "other": b"plain text\n" * 9,
    }[damage]
    path = tmp_path / f"texts.txt{ending}"
    path.write_bytes(broken)
    with pytest.raises(InputError, match=r"texts\.txt.* is damaged, cut short or no"):
        list(read_texts(path))


@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
def test_files_packed_one_behind_the_other(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / ("texts.txt.gz" if pack is gzip.compress else "texts.txt.zst")
    path.write_bytes(b"".join(pack(b"line %d\n" % i) for i in range(9)))
    assert list(read_texts(path)) == [f"line {i}" for i in range(9)]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Is a directory"):
        open_binary(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"score": ' + "9" * 5_000 + "}", "not JSON"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"\\udfff": 1}', "half of a surrogate pair"),
        ("", "not JSON"),
    ],
    ids=["deep", "long number", "surrogate", "surrogate in a name", "empty"],
)
def test_json_that_cannot_be_used(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"data, line 7: .*{message}"):
        parse_json(text, "data, line 7")


def test_a_whole_surrogate_pair_is_a_character() -> None:
    assert parse_json('"\\ud83d\\ude00"', "data") == "\U0001f600"
