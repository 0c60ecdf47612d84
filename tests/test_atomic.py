"""Outputs appear whole or not at all."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgelm.atomic import new_file, new_folder
from edgelm.errors import InputError, OutputExistsError


def make(path: Path, text: str, *, force: bool = False) -> None:
    with new_folder(path, marker="mark", force=force) as folder:
        (folder / "mark").write_text(text, encoding="utf-8")


def test_a_folder_appears_complete(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out"
    with new_folder(path, marker="mark") as folder:
        (folder / "mark").write_text("1", encoding="utf-8")
        assert not path.exists()
    assert (path / "mark").read_text(encoding="utf-8") == "1"
    assert [p.name for p in path.parent.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        new_folder(tmp_path / "out", marker="mark") as folder,
    ):
        raise RuntimeError(folder)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_without_force(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with pytest.raises(OutputExistsError, match="--force"):
        make(tmp_path / "out", "new")
    assert (tmp_path / "out" / "mark").read_text(encoding="utf-8") == "old"


def test_force_replaces_only_at_the_end(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with (
        pytest.raises(RuntimeError),
        new_folder(tmp_path / "out", marker="mark", force=True),
    ):
        raise RuntimeError
    assert (tmp_path / "out" / "mark").read_text(encoding="utf-8") == "old"
    make(tmp_path / "out", "new", force=True)
    assert (tmp_path / "out" / "mark").read_text(encoding="utf-8") == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_never_replaces_what_edgelm_did_not_make(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="not made by edgelm"):
        make(home, "new", force=True)
    assert (home / "thesis.txt").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write to"):
        make(tmp_path / "file" / "out", "x")


def test_a_file_appears_complete(tmp_path: Path) -> None:
    with new_file(tmp_path / "r.json") as path:
        path.write_text("{}", encoding="utf-8")
        assert not (tmp_path / "r.json").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    with pytest.raises(OutputExistsError), new_file(tmp_path / "r.json"):
        pass
    with new_file(tmp_path / "r.json", force=True) as path:
        path.write_text("[]", encoding="utf-8")
    assert (tmp_path / "r.json").read_text(encoding="utf-8") == "[]"


def test_a_killed_process_leaves_no_output(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from edgelm.atomic import new_folder\n"
        "with new_folder(Path(sys.argv[1]), marker='m') as f:\n"
        "    (f / 'm').touch(); print('in', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out", "second try")
    assert (tmp_path / "out" / "mark").exists()
