"""A server whose index another process changes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.runtimes.service.conftest import serving

Bundles = Callable[..., Path]


def edgelm(*arguments: str) -> None:
    command = [sys.executable, "-m", "edgelm", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def write(path: Path, *texts: str) -> str:
    rows = [{"id": f"{path.stem}{i}", "text": text} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(lines, encoding="utf-8")
    return str(path)


def test_what_another_process_does_to_the_index_is_seen(
    bundles: Bundles, tmp_path: Path
) -> None:
    """Added, deleted, compacted, replaced and gone, while searches go on; no restart."""
    bundle, index = str(bundles("minilm", "int8")), tmp_path / "index"
    first = write(tmp_path / "a.jsonl", "a man plays a flute", "a train to paris")
    edgelm("index", "build", bundle, first, "-o", str(index))
    with (
        serving(bundle, "--index", str(index)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def found(query: str = "the stock market fell", k: int = 9) -> list[Any]:
            reply = client.post("/search", json={"query": query, "k": k})
            assert reply.status_code == 200, reply.text
            return [hit["text"] for hit in reply.json()]

        assert len(found()) == 2
        more = write(tmp_path / "b.jsonl", "the stock market fell", "rain in london")
        with ThreadPoolExecutor(4) as pool:  # searches go on meanwhile
            pending = [pool.submit(found) for _ in range(20)]
            edgelm("index", "add", str(index), bundle, more)
            assert {len(one.result()) for one in pending} <= {2, 4}
        assert found()[0] == "the stock market fell"
        assert len(found()) == 4
        assert client.get("/status").json()["index"]["rows"] == 4
        edgelm("index", "delete", str(index), "a1")
        edgelm("index", "compact", str(index))
        assert len(found()) == 3
        shutil.move(index, tmp_path / "away")
        assert len(found()) == 3  # as it was
        other = str(bundles("embedding"))
        edgelm("index", "build", other, first, "-o", str(index))
        reply = client.post("/search", json={"query": "rain"})
        assert reply.status_code == 424
        assert "were made by" in reply.json()["error"]
        assert client.get("/status").json()["index"]["rows"] == 3
        edgelm("index", "build", bundle, more, "-o", str(index), "--force")
        assert sorted(found()) == ["rain in london", "the stock market fell"]
        assert server.stop() == 0
