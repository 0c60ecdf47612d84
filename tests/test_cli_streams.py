"""What a shell does to a command's streams: closed, full, in another encoding, interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Bundles = Callable[..., Path]
EDGELM = f"{sys.executable} -m edgelm"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", command.replace("edgelm", EDGELM, 1)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_closed_stream(closed: str) -> None:
    done = shell(f"edgelm targets --json {closed}")
    assert (done.returncode, done.stderr) == (0, b"")
    if closed != ">&-":
        assert all(json.loads(line)["name"] for line in done.stdout.splitlines())


def test_a_full_disk() -> None:
    done = shell("edgelm targets cpu >/dev/full")
    assert done.returncode == 1
    assert done.stderr == b"Error: No space left on device.\n"


def test_json_is_utf8_whatever_the_locale(bundles: Bundles) -> None:
    done = shell(f"edgelm run {bundles('embedding')} é", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode("utf-8"))["text"] == "é"


def test_an_argument_that_is_not_unicode(bundles: Bundles) -> None:
    done = shell(rf"edgelm run {bundles('embedding')} \"$(printf 'a\377')\"")
    assert done.returncode == 1
    assert b"half of a surrogate pair" in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_ctrl_c_ends_with_130_and_one_line(bundles: Bundles) -> None:
    command = [sys.executable, "-m", "edgelm", "run", str(bundles("embedding"))]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"the man\n")
    process.stdin.flush()
    assert process.stdout.readline()  # it is at work, and waits for more
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (130, b"", b"Interrupted.\n")
