"""What a journal keeps, and how it recovers."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelm.errors import InputError
from edgelm.tuning.journal import Journal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("journal") / "journal.jsonl"
    journal = Journal(path, {"seed": 1})
    for i in range(3):
        journal.put({"trial": i}, {"quality": 90.5 + i, "name": "naïve"})
    return path


@given(cut=st.integers(0, 400))
def test_cut_anywhere_it_knows_the_whole_lines(whole: Path, cut: int) -> None:
    text = whole.read_bytes()[:cut]
    path = whole.with_name("cut.jsonl")
    path.write_bytes(text)
    journal = Journal(path, {"seed": 1})
    lines = text.count(b"\n")
    for i in range(3):
        known = journal.get({"trial": i})
        assert (known is not None) == (i < lines - 1)
        if known is not None:
            assert known == {"quality": 90.5 + i, "name": "naïve"}
    journal.put({"trial": 7}, 7)
    assert Journal(path, {"seed": 1}).get({"trial": 7}) == 7


def test_the_order_of_keys_says_nothing(whole: Path) -> None:
    journal = Journal(None, {})
    journal.put({"a": 1, "b": 2}, "x")
    assert journal.get({"b": 2, "a": 1}) == "x"


def test_other_settings_are_refused_by_name(whole: Path) -> None:
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        Journal(whole, {"seed": 2})


def test_a_line_that_is_none_is_named(whole: Path) -> None:
    path = whole.with_name("bad.jsonl")
    lines = whole.read_bytes().split(b"\n")
    lines[2] = b"[]"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match="line 3: this is no line of a journal"):
        Journal(path, {"seed": 1})


def test_a_disk_without_room_is_said_and_nothing_is_lost(whole: Path) -> None:
    """A real process whose files may not grow by more than a part of a line."""
    path = whole.with_name("full.jsonl")
    path.write_bytes(whole.read_bytes())
    room = path.stat().st_size + 10
    script = (
        "import sys; from pathlib import Path; from edgelm.tuning.journal import Journal\n"
        "Journal(Path(sys.argv[1]), {'seed': 1}).put({'trial': 9}, 'a' * 100)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
    )
    assert done.returncode == 1
    assert f"Cannot write to {path}" in done.stderr
    assert "the same command goes on" in done.stderr
    journal = Journal(path, {"seed": 1})
    assert journal.get({"trial": 2})["quality"] == 92.5
    assert journal.get({"trial": 9}) is None
