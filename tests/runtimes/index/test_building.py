"""Texts to an index and back: streaming, resuming, the commands, and what they refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import edgelm
from edgelm.cli import cli
from edgelm.errors import BinaryIndexError, InputError
from edgelm.runtimes.index import BinaryIndex, EncoderInfo
from edgelm.runtimes.index.building import Source, add_documents, build_index
from edgelm.runtimes.index.encoding import TextEncoder

Bundles = Callable[..., Path]
WORDS = [
    "the",
    "old",
    "man",
    "city",
    "river",
    "plays",
    "sings",
    "reads",
    "writes",
    "book",
    "flute",
    "garden",
]


@pytest.fixture(scope="module")
def encoder(bundles: Bundles) -> TextEncoder:
    embedder = edgelm.load(bundles("embedding"))
    assert isinstance(embedder, edgelm.Embedder)
    return TextEncoder(embedder)


def text(number: int) -> str:
    return " ".join(WORDS[number // 12**i % 12] for i in range(4))


def json_lines(count: int, start: int = 0) -> list[bytes]:
    rows = ({"id": f"d{i}", "text": text(i)} for i in range(start, start + count))
    return [json.dumps(row).encode() + b"\n" for row in rows]


def source(lines: Any) -> Source:
    return Source("data", lines, as_json=True)


def test_what_was_built_finds_its_own_texts(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    added = build_index(tmp_path / "index", encoder, source(json_lines(1500)))
    assert (added.documents, added.truncated, added.resumed) == (1500, 0, 0)
    index = BinaryIndex(tmp_path / "index")
    index.verify()
    asked = encoder.queries([text(1234), text(7)])
    found = index.search(asked.rows, 1500, vectors=asked.vectors)
    exact = encoder.documents([text(i) for i in range(1500)]).vectors @ asked.vectors.T
    for i, hits in enumerate(found):
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)
        expected = [exact[int(hit.id[1:]), i] for hit in hits]
        assert scores == pytest.approx(expected, rel=0.02)  # of int8
        assert len({hit.id for hit in hits}) == 1500
    assert {hit.id: hit.text for hit in found[0]}["d1234"] == text(1234)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_codes_are_the_signs_of_the_vectors(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    build_index(tmp_path / "i", encoder, source(json_lines(3)), vectors=None)
    documents = encoder.documents([text(i) for i in range(3)])
    stored = BinaryIndex(tmp_path / "i")._snapshot.codes
    assert (stored == documents.codes).all()
    assert (np.unpackbits(stored, axis=1) == (documents.vectors > 0)).all()


class _Interrupted(Exception):
    pass


def interrupted(lines: list[bytes], after: int) -> Iterator[bytes]:
    yield from lines[:after]
    raise _Interrupted


def test_an_interrupted_build_goes_on_behind_its_last_batch(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    lines = json_lines(3000)
    with pytest.raises(_Interrupted):
        build_index(tmp_path / "i", encoder, source(interrupted(lines, 2500)))
    assert not (tmp_path / "i").exists()
    changed = [lines[0].replace(b"the", b"new"), *lines[1:]]
    with pytest.raises(InputError, match="other documents or settings"):
        build_index(tmp_path / "i", encoder, source(changed))
    with pytest.raises(InputError, match="other documents or settings"):
        build_index(tmp_path / "i", encoder, source(lines), vectors=None)
    steps: list[int] = []
    added = build_index(tmp_path / "i", encoder, source(lines), progress=steps.append)
    assert (added.documents, added.resumed) == (3000, 2048)
    assert steps == [2048, 3000]
    build_index(tmp_path / "straight", encoder, source(lines))
    for name in ("codes", "rows", "records", "vectors"):
        parts = [
            (tmp_path / i / "data-0" / name).read_bytes() for i in ("i", "straight")
        ]
        assert parts[0] == parts[1]


def test_a_build_killed_after_its_last_batch_is_only_moved(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    lines = json_lines(10)
    build_index(tmp_path / "i", encoder, source(lines))
    (tmp_path / "i").rename(tmp_path / ".i.partial")
    added = build_index(tmp_path / "i", encoder, source(lines))
    assert (added.documents, added.resumed) == (10, 10)


def test_documents_come_in_several_forms(encoder: TextEncoder, tmp_path: Path) -> None:
    lines = [
        b'{"_id": "a", "title": "The flute", "text": "plays"}\n',
        b"\n",
        b'{"id": 17, "text": "the river", "title": ""}\n',
        b'{"text": "garden"}',
    ]
    build_index(tmp_path / "i", encoder, source(lines))
    snapshot = BinaryIndex(tmp_path / "i")._snapshot
    assert snapshot.read(np.arange(3)) == [
        ("a", "The flute plays"),
        ("17", "the river"),
        ("4", "garden"),
    ]
    plain = Source("data", io.BytesIO(b"the river\n\na book\r\n"), as_json=False)
    build_index(tmp_path / "p", encoder, plain, texts=False)
    snapshot = BinaryIndex(tmp_path / "p")._snapshot
    assert snapshot.read(np.arange(2)) == [("1", ""), ("3", "")]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b"\xff\n", "data, line 3: byte 0xff at position 1 is not UTF-8"),
        (b"{\n", "data, line 3: not JSON"),
        (b"[1]\n", "data, line 3: there is no string field text"),
        (b'{"text": 1}\n', "data, line 3: there is no string field text"),
        (b'{"text": "a", "id": 1.5}\n', "data, line 3: the id is neither"),
        (b'{"text": "a", "id": true}\n', "data, line 3: the id is neither"),
        (b'{"text": "a", "id": "d1"}\n', "lines 1 to 3: The id 'd1' is given twice"),
    ],
)
def test_a_bad_document_is_named(
    encoder: TextEncoder, tmp_path: Path, line: bytes, sentence: str
) -> None:
    with pytest.raises(InputError) as caught:
        build_index(tmp_path / "i", encoder, source([*json_lines(2), line]))
    assert sentence in str(caught.value)
    assert not (tmp_path / "i").exists()
    # Mended, the same build goes through.
    assert build_index(tmp_path / "i", encoder, source(json_lines(3))).documents == 3


def test_an_id_of_an_earlier_batch_is_named(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    lines = [*json_lines(1024), *json_lines(1)]
    with pytest.raises(InputError, match=r"lines 1025 to 1025.*'d0' already"):
        build_index(tmp_path / "i", encoder, source(lines))


@pytest.mark.parametrize("lines", [[], [b"\n", b" \n"]])
def test_an_empty_corpus_is_refused(
    encoder: TextEncoder, tmp_path: Path, lines: list[bytes]
) -> None:
    with pytest.raises(InputError, match="data holds no documents"):
        build_index(tmp_path / "i", encoder, source(lines))
    assert not list(tmp_path.iterdir())


def foreign(path: Path, bits: int) -> BinaryIndex:
    return BinaryIndex.create(path, bits, encoder=EncoderInfo("other", "b" * 64))


def test_documents_of_another_encoder_are_refused(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    index = foreign(tmp_path / "i", encoder.bits)
    with pytest.raises(BinaryIndexError, match=r"were made by other .* not by"):
        add_documents(index, encoder, source(json_lines(1)))
    assert len(BinaryIndex(tmp_path / "i")) == 0


def run(*args: object, input: str | None = None) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=input)


def test_the_commands_from_build_to_search(bundles: Bundles, tmp_path: Path) -> None:
    bundle, path, data = bundles("embedding"), tmp_path / "i", tmp_path / "d.jsonl"
    data.write_bytes(b"".join(json_lines(40)))
    done = run("index", "build", bundle, data, "-o", path, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["documents"] == 40
    assert run("index", "build", bundle, data, "-o", path).exit_code == 1
    more = "the old river\n" + " ".join(["river"] * 100) + "\n"
    done = run("index", "add", path, bundle, "-", "--replace", input=more)
    assert "2 documents, 1 cut to what the model takes" in done.stderr
    done = run("index", "search", path, bundle, text(7), text(30), "-k", 42)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["query"] for row in rows] == [text(7), text(30)]
    for row in rows:
        assert len({hit["id"] for hit in row["hits"]}) == 42
        scores = [hit["score"] for hit in row["hits"]]
        assert scores == sorted(scores, reverse=True)
    done = run("index", "delete", path, "--input", "-", input="d7\n1\n")
    assert "holds 40 documents" in done.stderr
    assert run("index", "delete", path, "d7").exit_code == 1
    assert "holds 40 documents" in run("index", "compact", path).stderr
    about = json.loads(run("index", "info", path, "--verify", "--json").stdout)
    assert (about["documents"], about["deleted"], about["bits"]) == (40, 0, 32)
    assert run("index", "info", path).exit_code == 0


def test_a_build_on_a_full_disk_goes_on_when_there_is_room(
    encoder: TextEncoder, tmp_path: Path
) -> None:
    """A real tmpfs that is too small, and then is made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    try:
        lines = json_lines(4000)
        with pytest.raises(BinaryIndexError, match=r"No space left.*make room"):
            build_index(disk / "index", encoder, source(lines))
        assert not (disk / "index").exists()
        more = ["mount", "-o", "remount,size=4m", str(disk)]
        subprocess.run(more, check=True)
        added = build_index(disk / "index", encoder, source(lines))
        assert added.documents == 4000
        assert 0 < added.resumed < 4000
        index = BinaryIndex(disk / "index")
        index.verify()
        build_index(tmp_path / "index", encoder, source(lines))
        same = (disk / "index/data-0/codes").read_bytes()
        assert (tmp_path / "index/data-0/codes").read_bytes() == same
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_query_that_is_too_long_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    bundle, path, data = bundles("embedding"), tmp_path / "i", tmp_path / "d.txt"
    data.write_text("the river\nthe flute\n", "utf-8")
    assert run("index", "build", bundle, data, "-o", path).exit_code == 0
    long = " ".join(["river"] * 100)
    done = run("index", "search", path, bundle, long)
    assert done.exit_code == 1
    assert "longer than the 32 tokens that the model takes" in done.stderr
    done = run("index", "search", path, bundle, long, "--truncate")
    assert json.loads(done.stdout)["hits"][0]["text"] == "the river"


def test_a_search_with_another_bundle_is_refused(
    bundles: Bundles, tmp_path: Path
) -> None:
    foreign(tmp_path / "i", 32)
    done = run("index", "search", tmp_path / "i", bundles("embedding"), "river")
    assert done.exit_code == 1
    assert "were made by other" in done.stderr
    done = run("index", "search", tmp_path / "i", bundles("ner"), "river")
    assert done.exit_code == 1
    assert "gives no vectors" in done.stderr


@pytest.mark.parametrize("command", ["search", "delete"])
def test_nothing_to_do_is_a_usage_error(command: str, tmp_path: Path) -> None:
    args = [tmp_path / "i"] + [tmp_path / "b"] * (command == "search")
    assert run("index", command, *args).exit_code == 2


def test_a_build_that_is_killed_is_taken_up(bundles: Bundles, tmp_path: Path) -> None:
    """Killed once two batches are in, while it waits for more."""
    command = [sys.executable, "-m", "edgelm", "index", "build"]
    command += [str(bundles("embedding")), "-", "--format", "jsonl", "-o", "i"]
    lines = json_lines(2500)
    child = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path)
    assert child.stdin is not None
    child.stdin.write(b"".join(lines[:2200]))
    child.stdin.flush()
    partial = tmp_path / ".i.partial"
    while not partial.exists() or BinaryIndex(partial).manifest.rows < 2048:
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()
    done = subprocess.run(
        command, input=b"".join(lines), cwd=tmp_path, capture_output=True
    )
    assert b"2500 documents, taken up after line 2048" in done.stderr
    assert len(BinaryIndex(tmp_path / "i")) == 2500
