"""Memory of a build as it goes on: synthetic texts, streamed through an encoder into an index.

    python benchmarks/index_build.py BUNDLE --texts 1000000 -o index-build.json

Texts are of six random words, made one by one. At every tenth of the way: texts a second so far, the process's own
memory (RssAnon) and its peak so far, mapped files included (VmHWM). With --ray the encoding is done elsewhere.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
import numpy as np
from retrieval import resident_mib, show

import edgelm
from edgelm.bundle import open_bundle
from edgelm.runtimes.index.building import Source, build_index
from edgelm.runtimes.index.cluster import connect
from edgelm.runtimes.index.encoding import TextEncoder

WORDS = 20_000


def lines(count: int) -> Iterator[bytes]:
    draw = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(draw.choice(letters, draw.integers(3, 9))) for _ in range(WORDS)]
    for _ in range(count):
        text = " ".join(words[i] for i in draw.integers(0, WORDS, 6))
        yield f"{text}\n".encode()


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--texts", default=1_000_000, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--ray", "address")
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    bundle: Path, texts: int, threads: int, address: str | None, output: Path | None
) -> None:
    embedder = edgelm.load(bundle, threads=threads)
    assert isinstance(embedder, edgelm.Embedder)
    local = TextEncoder(embedder)
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()

    def progress(done: int) -> None:
        if done and done * 10 // texts >= len(rows) + 1:
            rows.append(
                {
                    "texts": done,
                    "texts/s": round(done / (time.perf_counter() - began)),
                    "own MiB": resident_mib("RssAnon"),
                    "peak MiB": resident_mib("VmHWM"),
                }
            )
            click.echo(json.dumps(rows[-1]), err=True)

    on = (
        nullcontext(local)
        if address is None
        else connect(address, open_bundle(bundle), local)
    )
    with tempfile.TemporaryDirectory() as folder, on as encoder:
        source = Source("synthetic", lines(texts), as_json=False)
        build_index(Path(folder) / "index", encoder, source, progress=progress)
    show(f"Building an index of {texts} texts", rows)
    if output is not None:
        output.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
