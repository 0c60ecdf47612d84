"""What is acknowledged stays: kills, truncation at every byte, flipped bits, full disks, company."""

from __future__ import annotations

import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgelm.errors import BinaryIndexError, EdgelmError, OutputExistsError
from edgelm.runtimes.index import BinaryIndex
from edgelm.runtimes.index.manifest import _canonical, _digest, read_manifest

CRASH = Path(__file__).with_name("crash.py")


def small(path: Path, rows: int = 5) -> BinaryIndex:
    index = BinaryIndex.create(path, 32, vectors="float16", dimension=2)
    grow(index, "first", rows)
    return index


def grow(index: BinaryIndex, name: str, rows: int) -> None:
    codes = np.random.default_rng(rows).integers(0, 256, (rows, 4), np.uint8)
    ids = [f"{name}-{i}" for i in range(rows)]
    vectors = np.ones((rows, 2), np.float32)
    index.add(ids, codes, texts=[f"text {i}" for i in ids], vectors=vectors)


def fill(index: BinaryIndex) -> None:
    for batch in itertools.count():
        grow(index, f"batch{batch}", 300)


def crash(*args: object) -> str:
    command = [sys.executable, str(CRASH), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kill_at_any_line_costs_the_batch_in_flight(in_memory: Path) -> None:
    said = crash("lines", in_memory / "index", 3, 17)
    assert [line.split(":")[0] for line in said.splitlines()] == [
        "add",
        "delete",
        "compact",
    ]


def test_kills_at_random_moments_lose_nothing(in_memory: Path) -> None:
    assert "30 deaths" in crash("moments", in_memory / "index", 1, 30)


@pytest.mark.slow
def test_a_kill_at_every_line_and_many_at_random(in_memory: Path) -> None:
    crash("lines", in_memory / "index", 1, 1)
    for seed in range(5):
        crash("moments", in_memory / f"index-{seed}", seed, 200)


def test_a_batch_that_was_cut_anywhere_is_as_if_it_had_not_been(
    tmp_path: Path,
) -> None:
    """The files of a batch, each cut at each of its bytes, under the manifest before it."""
    small(tmp_path / "before")
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    index = BinaryIndex(tmp_path / "after")
    grow(index, "second", 2)
    index.delete(["first-0"])
    old = read_manifest(tmp_path / "before")
    new = read_manifest(tmp_path / "after")
    cut = tmp_path / "cut"
    for name, state in new.files.items():
        data = (tmp_path / "after" / new.folder / name).read_bytes()
        for size in range(old.files[name].size, state.size + 1):
            shutil.copytree(tmp_path / "before", cut)
            (cut / old.folder / name).write_bytes(data[:size])
            found = BinaryIndex(cut)
            found.verify()
            assert len(found) == 5
            shutil.rmtree(cut)
    shutil.copytree(tmp_path / "after" / new.folder, cut / old.folder)
    shutil.copy(tmp_path / "before" / "index.json", cut)
    index = BinaryIndex(cut)
    grow(index, "third", 3)  # over the whole tail of the other batch
    index.verify()
    assert len(BinaryIndex(cut)) == 8
    assert (cut / old.folder / "codes").stat().st_size == 8 * 4


def test_what_is_missing_from_acknowledged_files_is_said(tmp_path: Path) -> None:
    index = small(tmp_path / "index")
    grow(index, "second", 2)
    index.delete(["first-0"])
    manifest = index.manifest
    for name, state in manifest.files.items():
        path = tmp_path / "index" / manifest.folder / name
        data = path.read_bytes()
        for size in range(state.size):
            path.write_bytes(data[:size])
            with pytest.raises(BinaryIndexError, match=f"{name} is truncated: it has"):
                BinaryIndex(tmp_path / "index")
        path.unlink()
        with pytest.raises(BinaryIndexError, match=f"Cannot read .*{name}"):
            BinaryIndex(tmp_path / "index")
        with pytest.raises(BinaryIndexError):
            index.writer()
        path.write_bytes(data)
    BinaryIndex(tmp_path / "index").verify()


def test_a_flipped_bit_in_any_byte_of_the_manifest_is_seen(tmp_path: Path) -> None:
    small(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    raw = path.read_bytes()
    for at in range(len(raw)):
        flipped = raw[at] ^ (1 << at % 8)
        path.write_bytes(raw[:at] + bytes([flipped]) + raw[at + 1 :])
        with pytest.raises(BinaryIndexError):
            BinaryIndex(tmp_path / "index")
    for size in range(0, len(raw), 5):
        path.write_bytes(raw[:size])
        with pytest.raises(BinaryIndexError):
            BinaryIndex(tmp_path / "index")
    path.write_bytes(raw)
    assert len(BinaryIndex(tmp_path / "index")) == 5


def test_flipped_bits_of_the_files_are_found(tmp_path: Path) -> None:
    """By `verify` everywhere; in what a search returns, and before compaction, at once."""
    index = small(tmp_path / "index")
    index.delete(["first-4"])
    query = np.zeros((1, 4), np.uint8)
    before = index.search(query, 5)
    for name, state in index.manifest.files.items():
        path = tmp_path / "index" / index.manifest.folder / name
        data = path.read_bytes()
        for at in range(state.size):
            path.write_bytes(
                data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :]
            )
            with pytest.raises(BinaryIndexError, match=f"{name} is damaged"):
                BinaryIndex(tmp_path / "index").verify()
            if name == "records":
                try:
                    assert BinaryIndex(tmp_path / "index").search(query, 5) == before
                except BinaryIndexError as error:
                    assert "records is damaged" in str(error)  # noqa: PT017
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(BinaryIndexError, match=f"{name} is damaged"):
            index.compact()
        path.write_bytes(data)
    assert BinaryIndex(tmp_path / "index").search(query, 5) == before


def test_damaged_lists_are_an_error_and_not_a_crash(tmp_path: Path) -> None:
    centres = np.repeat(np.eye(32, dtype=np.uint8), 30, axis=0)
    index = BinaryIndex.create(tmp_path / "index", 32)
    index.add([str(i) for i in range(960)], np.packbits(centres, axis=1))
    index.compact("always")
    assert index.manifest.approximate is not None
    path = tmp_path / "index" / index.manifest.folder / "lists"
    raw = path.read_bytes()
    path.write_bytes(b"\0" * len(raw))
    with pytest.raises(BinaryIndexError, match="lists is damaged"):
        BinaryIndex(tmp_path / "index").search(np.zeros((1, 4), np.uint8))
    with pytest.raises(BinaryIndexError, match="lists is damaged"):
        index.verify()


def test_a_newer_index_is_refused_by_name(tmp_path: Path) -> None:
    small(tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    data = json.loads(path.read_text("utf-8"))
    data.pop("digest")
    data["format_version"] = 2
    path.write_bytes(_canonical({**data, "digest": _digest(data)}))
    with pytest.raises(BinaryIndexError, match=r"format 2; this edgelm reads up to 1"):
        BinaryIndex(tmp_path / "index")


@pytest.mark.parametrize("make", ["nothing", "file", "folder"])
def test_what_is_no_index_is_said(tmp_path: Path, make: str) -> None:
    path = tmp_path / "x"
    if make == "file":
        path.write_text("x", "utf-8")
    elif make == "folder":
        path.mkdir()
    with pytest.raises(BinaryIndexError, match="is not an index"):
        BinaryIndex(path)


def test_an_index_is_not_made_over_another(tmp_path: Path) -> None:
    small(tmp_path / "index")
    with pytest.raises(OutputExistsError):
        BinaryIndex.create(tmp_path / "index", 32)
    (tmp_path / "home").mkdir()
    with pytest.raises(OutputExistsError, match="not made by edgelm"):
        BinaryIndex.create(tmp_path / "home", 32, force=True)


def test_a_full_disk_costs_the_batch_and_nothing_else(tmp_path: Path) -> None:
    """A real tmpfs that is too small."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if (
        not shutil.which("mount")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    try:
        index = small(disk / "index")
        with pytest.raises(BinaryIndexError, match=r"No space left.*of this batch"):
            fill(index)
        rows = len(index)
        assert rows > 300
        found = BinaryIndex(disk / "index")
        found.verify()
        assert len(found) == rows
        with pytest.raises(BinaryIndexError, match="The index is as it was"):
            found.compact()
        found = BinaryIndex(disk / "index")
        found.verify()
        assert len(found) == rows
        grow(found, "small", 1)  # what does fit still goes in
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_limit_on_file_sizes_costs_the_batch_and_nothing_else(
    tmp_path: Path,
) -> None:
    """The same without rights, wherever in the batch the disk is full."""
    index = small(tmp_path / "index")
    before = index.manifest
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (50, 100, 200, 400, 700):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(BinaryIndexError, match="Nothing of this batch"):
                grow(index, "second", 40)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        found = BinaryIndex(tmp_path / "index")
        found.verify()
        assert found.manifest == before
        assert not list((tmp_path / "index").glob("*.new"))
    grow(index, "second", 40)
    assert len(index) == 45


READER = """
import sys, numpy as np
from edgelm.runtimes.index import BinaryIndex
looks, seen = 0, set()
while True:
    index = BinaryIndex(sys.argv[1])
    rows, scores = index.search_rows(np.zeros((1, 4), np.uint8), 10_000)
    names = [name.split("-")[0] for name, _ in index._snapshot.read(rows[0])]
    for name in set(names):
        assert names.count(name) == 10, (name, names.count(name))
    assert len(names) == len(index)
    seen.add(len(names))
    looks += 1
    if looks == 1:
        print("ready", flush=True)
    if "last" in names:
        break
print(looks, len(seen))
"""


def test_readers_see_whole_batches_while_a_writer_works(in_memory: Path) -> None:
    """Batches of ten appear and go whole; compaction pulls no file away."""
    index = BinaryIndex.create(in_memory / "index", 32)
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(in_memory / "index")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    random = np.random.default_rng(0)
    for reader in readers:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "ready\n"
    with index.writer() as writer:
        for batch in range(150):
            codes = random.integers(0, 256, (10, 4), np.uint8)
            writer.add([f"b{batch}-{i}" for i in range(10)], codes)
            if batch % 3 == 2:
                writer.delete([f"b{batch - 1}-{i}" for i in range(10)])
            if batch % 10 == 9:
                writer.compact()
        writer.add([f"last-{i}" for i in range(10)], codes)
    for reader in readers:
        out, error = reader.communicate(timeout=60)
        assert reader.returncode == 0, error
        looks, states = map(int, out.split())
        assert looks > 5
        assert states > 5


def test_a_snapshot_stays_until_it_is_refreshed(tmp_path: Path) -> None:
    index = small(tmp_path / "index")
    old = BinaryIndex(tmp_path / "index")
    query = np.zeros((1, 4), np.uint8)
    before = old.search(query, 9)
    assert old.is_current()
    grow(index, "second", 3)
    assert not old.is_current()
    index.delete(["first-1"])
    assert old.search(query, 9) == before
    index.compact()
    assert old.search(query, 9) == before  # its files are gone from the folder
    assert not old.is_current()
    old.refresh()
    assert old.is_current()
    assert len(old) == 7


def test_there_is_one_writer_at_a_time(tmp_path: Path) -> None:
    index = small(tmp_path / "index")
    script = (
        "import sys; from edgelm.runtimes.index import BinaryIndex\n"
        "from edgelm.errors import BinaryIndexError\n"
        "try: BinaryIndex(sys.argv[1]).delete(['first-0'])\n"
        "except BinaryIndexError as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "index")]
    with index.writer():
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        assert f"is being changed by process {os.getpid()}" in said.stdout
        with pytest.raises(BinaryIndexError, match="is being changed"):
            index.delete(["first-0"])
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert said.stdout == ""
    assert len(BinaryIndex(tmp_path / "index")) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_index_that_may_only_be_read_can_be_read(tmp_path: Path) -> None:
    index = small(tmp_path / "index")
    (tmp_path / "index" / "lock").unlink()
    (tmp_path / "index").chmod(0o555)
    try:
        assert len(index.search(np.zeros((1, 4), np.uint8), 5)[0]) == 5
        with pytest.raises(EdgelmError, match="reading only"):
            index.delete(["first-0"])
    finally:
        (tmp_path / "index").chmod(0o755)
