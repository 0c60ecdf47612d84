"""A real server: a process of its own on a free port."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

Bundles = Callable[..., Path]


class Server:
    """A running server.

    Attributes:
        url: Where it is.
        process: Its process.
    """

    def __init__(self, url: str, process: subprocess.Popen[str], log: Any) -> None:
        self.url, self.process, self._log = url, process, log

    def log(self) -> list[dict[str, Any]]:
        """Its log lines so far."""
        self._log.flush()
        self._log.seek(0)
        lines = self._log.read().split("\n")
        return [json.loads(line) for line in lines if line.startswith("{")]

    def stop(self) -> int:
        """SIGTERM, and its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def serving(*arguments: str, **environment: str) -> Iterator[Server]:
    """Start a server and wait for the line that says where it is."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgelm", "serve", *arguments, "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, **environment},
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise AssertionError(log.read())
            yield Server(json.loads(line)["url"], process, log)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]


@pytest.fixture(scope="package")
def server(
    bundles: Bundles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """`minilm` in int8, tiny models for the other tasks, and an index."""
    folder = tmp_path_factory.mktemp("served")
    texts = ["a man plays a flute", "the stock market fell", "a train to paris"]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    minilm = str(bundles("minilm", "int8"))
    build = ["index", "build", minilm, str(folder / "texts.txt")]
    command = [sys.executable, "-m", "edgelm", *build, "-o", str(folder / "index")]
    subprocess.run(command, check=True, capture_output=True)
    arguments = [
        f"minilm={minilm}",
        f"ner={bundles('ner')}",
        f"pairs={bundles('scorer')}",
    ]
    limits = ["--max-client-batch", "40", "--max-request-bytes", "200000"]
    index = ["--index", str(folder / "index")]
    with serving(*arguments, *index, *limits) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A client of the server."""
    with httpx.Client(base_url=server.url, timeout=60) as opened:
        yield opened
