"""`edgelm run --watch`: a real process, lines one by one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Bundles = Callable[..., Path]
Process = subprocess.Popen


@pytest.fixture
def watch(bundles: Bundles) -> Iterator[Callable[..., Process[bytes]]]:
    """Start a watch; it is ended with the test."""
    started: list[Process[bytes]] = []

    def start(kind: str, *flags: str) -> Process[bytes]:
        command = [sys.executable, "-m", "edgelm", "run", str(bundles(kind))]
        pipe = subprocess.PIPE
        process = Popen([*command, *flags], stdin=pipe, stdout=pipe, stderr=pipe)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None and not stream.closed:
                stream.close()


Popen = subprocess.Popen


def ask(process: Process[bytes], line: bytes) -> dict[str, object]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    process.stdin.flush()
    found: dict[str, object] = json.loads(process.stdout.readline())
    return found


def test_each_line_is_answered_before_the_next_and_a_bad_one_ends_nothing(
    watch: Callable[..., Process[bytes]],
) -> None:
    process = watch("scorer", "--watch")
    assert "score" in ask(process, b"the man\tthe woman\n")
    assert "one tab between" in str(ask(process, b"no tab\n")["error"])
    assert ask(process, b"\xff\t\n")["line"] == 3
    assert "score" in ask(process, b"\t\n")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")


def test_the_end_of_the_input_ends_a_watch(
    watch: Callable[..., Process[bytes]],
) -> None:
    process = watch("ner", "--watch", "--strategy", "none")
    out, err = process.communicate(b"the man\nlast line without its end")
    assert (process.returncode, err) == (0, b"")
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert texts == ["the man", "last line without its end"]


@pytest.mark.parametrize("flags", [["--watch"], []])
def test_a_reader_that_leaves_is_no_noise(
    watch: Callable[..., Process[bytes]], flags: list[str]
) -> None:
    """Stdin stays open: Python must not die of a thread that waits for it."""
    process = watch("ner", *flags)
    ask(process, b"the man\n")
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.close()
    process.stdin.write(b"paris\n")
    process.stdin.flush()
    assert process.wait() in (0, 1)
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_what_cannot_be_watched(
    watch: Callable[..., Process[bytes]], tmp_path: Path
) -> None:
    process = watch("ner", "--watch", "--input", str(tmp_path / "file"))
    assert b"--watch reads stdin" in process.communicate()[1]
    assert process.returncode == 2
    process = watch("embedding", "--watch", "--strategy", "max")
    assert b"are for bundles that find entities" in process.communicate()[1]
    process = watch("ner", "--dimensions", "8")
    assert b"are for bundles of embedding models" in process.communicate()[1]
