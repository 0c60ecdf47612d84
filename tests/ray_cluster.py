"""A Ray cluster of two workers for tests, apart from their process; and how to lose a worker."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Of the tests' own cluster: Ray lets in only those who know its token.
ENV = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@contextmanager
def two_workers() -> Iterator[str]:
    """The address of a new cluster, which ends behind it."""
    pytest.importorskip("ray")
    script = (
        "import ray, sys\n"
        "about = ray.init('local', num_cpus=2, include_dashboard=False, logging_level='error')\n"
        "print(about.address_info['gcs_address'], flush=True)\n"
        "sys.stdin.read()"
    )
    cluster = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENV,
    )
    assert cluster.stdout is not None
    try:
        yield cluster.stdout.readline().strip()
    finally:
        cluster.communicate(timeout=60)


def kill_a_worker(task: str) -> bool:
    """End a process that is at work on a task just now: Ray names it so."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                name = (folder / "cmdline").read_bytes()
                mine = folder.stat().st_uid == os.getuid()
            except OSError:
                continue
            if mine and name.startswith(f"ray::{task}".encode()):
                os.kill(int(folder.name), signal.SIGKILL)
                return True
    return False


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
