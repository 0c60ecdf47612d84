"""An index built on Ray is the one that is built here, also when a worker is lost."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgelm.cli import cli
from edgelm.runtimes.index import BinaryIndex
from edgelm.runtimes.index.manifest import MANIFEST
from tests.ray_cluster import ENV, kill_a_worker, two_workers, wait_for
from tests.runtimes.index.test_building import json_lines

Bundles = Callable[..., Path]
FILES = ("codes", "factors", "vectors", "rows", "records", "deleted")


def build(bundle: Path, data: Path, output: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "edgelm", "index", "build", str(bundle), str(data)]
    return [*command, "-o", str(output), *more]


def contents(index: Path) -> dict[str, bytes]:
    BinaryIndex(index).verify()
    return {name: (index / "data-0" / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def corpus(
    bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, dict[str, bytes]]:
    """A bundle, documents (some lines are empty), and the index made of them here."""
    folder = tmp_path_factory.mktemp("corpus")
    data = folder / "corpus.jsonl"
    lines = json_lines(8_000)
    lines[5000:5000] = [b"\n"] * 1500
    data.write_bytes(b"".join(lines))
    bundle = bundles("embedding")
    subprocess.run(build(bundle, data, folder / "local"), check=True)
    return bundle, data, contents(folder / "local")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with two_workers() as found:
        yield found


@pytest.mark.slow
def test_the_index_is_the_same_byte_for_byte(
    corpus: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path
) -> None:
    bundle, data, due = corpus
    command = build(bundle, data, tmp_path / "index", "--ray", address, "--json")
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENV)
    about = json.loads(done.stdout)
    assert (about["documents"], about["resumed"]) == (8_000, 0)
    assert contents(tmp_path / "index") == due


@pytest.mark.slow
def test_lost_workers_and_a_lost_build_change_nothing(
    corpus: tuple[Path, Path, dict[str, bytes]], address: str, tmp_path: Path
) -> None:
    bundle, data, due = corpus
    command = build(bundle, data, tmp_path / "index", "--ray", address, "--json")
    manifest = tmp_path / ".index.partial" / MANIFEST
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENV)
    wait_for(lambda: manifest.exists() and lines_done(manifest) > 0)
    first.kill()
    first.wait()
    before = lines_done(manifest)
    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV)
    wait_for(lambda: kill_a_worker("encode_batch") or second.poll() is not None)
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0
    assert json.loads(output)["resumed"] >= before > 0
    assert contents(tmp_path / "index") == due


def test_an_address_where_nobody_listens_is_said(
    bundles: Bundles, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    data = tmp_path / "corpus.jsonl"
    data.write_bytes(b"".join(json_lines(3)))
    arguments = build(bundles("embedding"), data, tmp_path / "index")[3:]
    result = CliRunner().invoke(cli, [*arguments, "--ray", "127.0.0.1:1"])
    assert result.exit_code == 1
    assert "There is no Ray cluster at 127.0.0.1:1" in result.stderr
    assert "ray start --head" in result.stderr
    assert not (tmp_path / "index").exists()


def test_ray_that_is_not_installed_is_said(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "corpus.jsonl"
    data.write_bytes(b"".join(json_lines(3)))
    # As if it were not there: an entry of None makes the import fail.
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = build(bundles("embedding"), data, tmp_path / "index")[3:]
    result = CliRunner().invoke(cli, [*arguments, "--ray", "auto"])
    assert result.exit_code == 1
    assert "pip install 'edgelm[ray]'" in result.stderr


def lines_done(manifest: Path) -> int:
    about = json.loads(manifest.read_text("utf-8"))
    return int(about.get("progress", {}).get("lines", 0))
