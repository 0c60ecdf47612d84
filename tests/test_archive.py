"""A bundle as one file: packed alike, read everywhere, and hostile archives refused."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner

import edgelm
from edgelm.archive import SUFFIX, cache_folder, pack
from edgelm.bundle import MANIFEST, open_bundle
from edgelm.cli import cli
from edgelm.errors import BundleError
from edgelm.manifest import FileInfo

Members = list[tuple[tarfile.TarInfo, bytes]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def packed(tiny_bundle: Path, tmp_path: Path) -> Path:
    path = tmp_path / f"tiny{SUFFIX}"
    pack(open_bundle(tiny_bundle), path)
    return path


def members(path: Path) -> Members:
    raw = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes()))
    with tarfile.open(fileobj=io.BytesIO(raw.read())) as tar:
        return [(m, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]


def write(path: Path, content: Members) -> Path:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member, data in content:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    path.write_bytes(zstandard.compress(out.getvalue()))
    return path


def unpacked() -> list[Path]:
    """What lies in the cache, unfinished work included."""
    return list((cache_folder() / "bundles").iterdir())


def test_it_holds_what_the_folder_holds(packed: Path, tiny_bundle: Path) -> None:
    opened = open_bundle(packed)
    folder = open_bundle(tiny_bundle)
    assert opened.manifest == folder.manifest
    assert opened.archive == packed
    assert opened.size_bytes == folder.size_bytes
    texts = ["the man plays a flute", ""]
    found = edgelm.load(packed).encode(texts)  # type: ignore[union-attr]
    expected = edgelm.load(tiny_bundle).encode(texts)  # type: ignore[union-attr]
    np.testing.assert_array_equal(found, expected)


def test_the_same_bundle_gives_the_same_bytes(
    packed: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "elsewhere")
    for file in copy.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o600)
    pack(open_bundle(copy), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()


def test_tar_itself_reads_it(packed: Path, tiny_bundle: Path) -> None:
    found = {m.name: data for m, data in members(packed)}
    assert next(iter(found)) == MANIFEST
    assert found == {p.name: p.read_bytes() for p in tiny_bundle.iterdir()}


def test_it_is_unpacked_once(packed: Path) -> None:
    first = open_bundle(packed)
    stamp = (first.path / MANIFEST).stat().st_mtime_ns
    assert open_bundle(packed).path == first.path
    assert (first.path / MANIFEST).stat().st_mtime_ns == stamp
    assert unpacked() == [first.path]


def test_a_damaged_copy_in_the_cache_is_replaced(packed: Path) -> None:
    folder = open_bundle(packed).path
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    assert open_bundle(packed).path == folder
    assert (folder / "tokenizer.json").stat().st_size > 2
    assert unpacked() == [folder]


def test_two_processes_unpack_at_once(packed: Path) -> None:
    code = "import sys; from edgelm.bundle import open_bundle; print(open_bundle(sys.argv[1]).path)"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(packed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    ends = [(*process.communicate(), process.returncode) for process in running]
    assert [code for *_, code in ends] == [0, 0, 0], ends
    assert len({out for out, *_ in ends}) == 1
    assert len(unpacked()) == 1


def _outside(content: Members) -> None:
    content.append((tarfile.TarInfo("../outside"), b"x"))


def _absolute(content: Members) -> None:
    content.append((tarfile.TarInfo("/tmp/outside"), b"x"))


def _link(content: Members) -> None:
    link = tarfile.TarInfo("model.onnx")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    content[1:] = [(link, b""), *content[1:]]


def _hard_link(content: Members) -> None:
    link = tarfile.TarInfo("model.onnx")
    link.type, link.linkname = tarfile.LNKTYPE, "manifest.json"
    content[1:] = [(link, b""), *content[1:]]


def _twice(content: Members) -> None:
    content.append(content[-1])


def _longer(content: Members) -> None:
    content[-1] = (content[-1][0], content[-1][1] + b"x")


def _missing(content: Members) -> None:
    content.pop()


def _late_manifest(content: Members) -> None:
    content.append(content.pop(0))


def _long_name(content: Members) -> None:
    content.append((tarfile.TarInfo("a" * 5000), b"x"))


def _changed(content: Members) -> None:
    content[-1] = (content[-1][0], bytes(len(content[-1][1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, "does not list"),
        (_absolute, "does not list"),
        (_link, "not a plain file"),
        (_hard_link, "not a plain file"),
        (_long_name, "not a plain file"),
        (_twice, "does not list"),
        (_longer, "bytes instead of"),
        (_missing, "which its manifest lists"),
        (_late_manifest, "not its first file"),
        (_changed, "is damaged"),
    ],
)
def test_a_hostile_archive_leaves_nothing(
    packed: Path, tmp_path: Path, change: Callable[[Members], None], message: str
) -> None:
    content = members(packed)
    change(content)
    bad = write(tmp_path / "bad.tar.zst", content)
    with pytest.raises(BundleError, match=message):
        open_bundle(bad)
    assert unpacked() == []
    assert not (cache_folder() / "outside").exists()


def test_an_archive_that_unpacks_to_absurd_size_is_refused(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    from edgelm import bundle

    opened = open_bundle(tiny_bundle)
    files = {
        **opened.manifest.files,
        "zeros": FileInfo(300 << 20, "0" * 64),
    }
    text = bundle.schema.plain(replace(opened.manifest, files=files))
    data = {"format": "edgelm-bundle", "format_version": 1, **text}
    raw = bundle._canonical(data)
    data["digest"] = bundle.hashlib.sha256(raw).hexdigest()
    bad = write(
        tmp_path / "bomb.tar.zst",
        [
            (tarfile.TarInfo(MANIFEST), bundle._canonical(data)),
            (tarfile.TarInfo("zeros"), bytes(300 << 20)),
        ],
    )
    with pytest.raises(BundleError, match="more than 100 times its own size"):
        open_bundle(bad)
    assert unpacked() == []


def test_cut_or_changed_archives_are_refused(packed: Path, tmp_path: Path) -> None:
    raw = packed.read_bytes()
    for i, bad in enumerate((raw[:-30], raw[: len(raw) // 2], b"PK" + raw, raw[:4])):
        path = tmp_path / f"{i}.tar.zst"
        path.write_bytes(bad)
        with pytest.raises(BundleError):
            open_bundle(path)
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    with pytest.raises(BundleError):
        open_bundle(tmp_path / "flipped")


def test_without_zstandard_one_sentence_says_so(packed: Path) -> None:
    hide = "import sys; sys.modules['zstandard'] = None\nfrom edgelm.cli import main; main()"
    command = [sys.executable, "-c", hide, "info", str(packed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'edgelm[archive]'" in done.stderr
    assert "Traceback" not in done.stderr
    open_bundle(packed)  # once unpacked, it is no longer needed
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_where_nothing_can_be_unpacked(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BundleError, match="Set XDG_CACHE_HOME"):
        open_bundle(packed)


def test_the_commands_take_it(
    tiny_embedding: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def call(*args: object, code: int = 0) -> str:
        result = CliRunner().invoke(cli, [str(arg) for arg in args])
        assert result.exit_code == code, result.output
        return result.output

    make = ("export", tiny_embedding, "--target", "cpu", "-o", "b.tar.zst")
    said = call(*make)
    packed = Path("b.tar.zst").read_bytes()
    assert "MB packed" in said
    assert "exists already" in call(*make, code=1)
    call(*make, "--force")
    assert Path("b.tar.zst").read_bytes() == packed
    Path("folder.tar.zst").mkdir()
    assert "is a folder" in call(*make[:-1], "folder.tar.zst", "--force", code=1)
    assert "archive_bytes" in call("info", "b.tar.zst")
    assert "is whole" in call("verify", "b.tar.zst")
    assert "embedding" in call("run", "b.tar.zst", "the man")
    Path("pairs.jsonl").write_text(
        '{"text1": "the man", "text2": "a man", "score": 1}\n'
        '{"text1": "a book", "text2": "the city", "score": 0}\n',
        encoding="utf-8",
    )
    assert "spearman" in call("eval", "b.tar.zst", "--data", "pairs.jsonl").lower()
    assert "bundle already" in call(
        "compress", "b.tar.zst", "-o", "x", "--sparsity", "0.5", code=1
    )
