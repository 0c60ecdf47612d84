r"""`edgelm serve` under load, against sentence-transformers behind the same server, on loopback.

    pip install sentence-transformers
    python benchmarks/serve_load.py --work load -o load.json
    python benchmarks/serve_load.py --work load --soak 10

Every contender is a server in a process of its own; all run, and one at a time is loaded, taking turns.
A request is one text (`POST /embeddings`); a client sends its next when it has the answer to the last.

- edgelm: `minilm` in int8, or the bundle of --bundle; as many workers as there are cores.
- sentence-transformers: the app of `edgelm serve` with `SentenceTransformer.encode` of each request's texts,
  one request at a time (at once, they would only take each other's cores).
- infinity, with --infinity COMMAND: infinity-emb (`infinity_emb`), torch engine, on the same weights. Version 0.0.78
  runs with transformers<4.49, sentence-transformers<4, optimum<2, numpy<2: an environment of its own.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from threading import Lock
from typing import Any

import click
import numpy as np

from edgelm.calibration import Calibration, load_texts, read_texts
from edgelm.models import locate
from edgelm.runtimes.engine import cores

EDGELM, DIRECT = "edgelm", "sentence-transformers"
INFINITY = "infinity"
MODEL = "minilm"  # what requests name


def serve(name: str, bundle: Path) -> None:
    """Be a contender: the app of `edgelm serve` over a model."""
    from edgelm.bundle import open_bundle
    from edgelm.runtimes import Embedder
    from edgelm.runtimes.engine import open_engine
    from edgelm.runtimes.service.app import create_app
    from edgelm.runtimes.service.models import Models, Served, open_models
    from edgelm.runtimes.service.server import listen
    from edgelm.runtimes.service.server import serve as run
    from edgelm.runtimes.sharing import share

    if name == EDGELM:
        options = {"max_batch_tokens": None, "max_queue": 1024, "workers": cores()}
        served = open_models([f"{MODEL}={bundle}"], **options)
    else:
        from sentence_transformers import SentenceTransformer

        torch_model = SentenceTransformer(str(locate("minilm")), device="cpu")
        engine = open_engine(open_bundle(bundle))  # its tokenizer and manifest
        lock = Lock()

        class Direct(Embedder):
            def encode_with_truncation(self, texts: Sequence[str], **_: Any) -> Any:
                with lock:
                    rows = torch_model.encode(list(texts), show_progress_bar=False)
                return np.asarray(rows), np.zeros(len(texts), bool)

        served = [Served(MODEL, share(Direct(engine)))]
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        run(
            create_app(Models(served)),
            bound,
            ready=lambda: print(port, flush=True),
            grace_s=10,
        )


def start(name: str, bundle: Path, infinity: str | None) -> tuple[Any, int]:
    """A contender's process and port; torch and ONNX Runtime may use all cores."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    quiet = subprocess.DEVNULL
    if name == INFINITY:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        model = ["--model-id", str(locate("minilm")), "--engine", "torch"]
        model += ["--served-model-name", MODEL, "--device", "cpu"]
        options = ["--host", "127.0.0.1", "--port", str(port)]
        command = [str(infinity), "v2", *model, *options]
        child = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment)
        while child.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return child, port
            except OSError:
                time.sleep(0.2)
        raise SystemExit("infinity ended before it listened")
    command = [sys.executable, __file__, "--child", name, "--bundle", str(bundle)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=quiet, env=environment, text=True
    )
    assert child.stdout is not None
    return child, int(child.stdout.readline())


async def ask(streams: Any, text: str) -> int:
    """One request on an open connection; the status."""
    reader, writer = streams
    body = json.dumps({"input": text, "model": MODEL}).encode()
    head = ("POST /embeddings HTTP/1.1", "host: x", "content-type: application/json")
    lines = [*head, f"content-length: {len(body)}", "", ""]
    writer.write("\r\n".join(lines).encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", answer)
    await reader.readexactly(int(length[1]) if length else 0)
    return int(answer.split(b" ", 2)[1])


async def load(
    port: int, clients: int, seconds: float, texts: Sequence[str]
) -> tuple[list[float], int, float]:
    """Milliseconds of every answer, how many were no 200, and how long it took."""
    took: list[float] = []
    errors = 0
    began = time.perf_counter()

    async def client(number: int) -> None:
        nonlocal errors
        draw = random.Random(number)
        streams = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() - began < seconds:
            asked = time.perf_counter()
            errors += await ask(streams, draw.choice(texts)) != 200
            took.append(1000 * (time.perf_counter() - asked))
        streams[1].close()

    await asyncio.gather(*(client(i) for i in range(clients)))
    return took, errors, time.perf_counter() - began


def pss_mib(pid: int) -> float:
    """Proportional set size of a process, MiB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def soak(bundle: Path, minutes: float, texts: Sequence[str]) -> dict[str, Any]:
    """Load edgelm for a while: errors, and memory after each tenth of the time."""
    child, port = start(EDGELM, bundle, None)
    memory, answers, errors = [], 0, 0
    for part in range(10):
        took, failed, _ = asyncio.run(load(port, 8, 6 * minutes, texts))
        answers, errors = answers + len(took), errors + failed
        memory.append(round(pss_mib(child.pid), 1))
        print(
            f"{part + 1}/10: {answers} answers, {errors} errors, {memory[-1]} MiB",
            flush=True,
        )
    child.terminate()
    child.wait()
    return {
        "minutes": minutes,
        "answers": answers,
        "errors": errors,
        "memory_mib": memory,
    }


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: a row for every contender and number of clients."""
    lines = ["| clients | server | requests/s | times | p50 ms | p95 ms | p99 ms |"]
    lines.append("|---|---|---|---|---|---|---|")
    for clients, by_name in found.items():
        for name, row in by_name.items():
            cells = [row[k] for k in ("per_s", "times", "p50_ms", "p95_ms", "p99_ms")]
            lines.append(f"| {clients} | {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("load"))
@click.option("--bundle", type=click.Path(path_type=Path), help="else minilm, int8")
@click.option("--texts", multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--seconds", default=5.0, show_default=True, help="Of a turn.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--clients", multiple=True, type=int, default=(1, 8, 64))
@click.option("--infinity", help="The command infinity_emb of its own environment.")
@click.option("--soak", "minutes", type=float, help="Load edgelm for so many minutes.")
@click.option("--child", hidden=True)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def main(
    work: Path,
    bundle: Path | None,
    texts: tuple[Path, ...],
    seconds: float,
    rounds: int,
    clients: tuple[int, ...],
    infinity: str | None,
    minutes: float | None,
    child: str | None,
    output: Path | None,
) -> None:
    """Measure in turns, print a table, write JSON."""
    if child is not None:
        assert bundle is not None
        serve(child, bundle)
        return
    if bundle is None:
        bundle = work / "minilm-int8"
        if not bundle.exists():
            work.mkdir(parents=True, exist_ok=True)
            export = ["export", "minilm", "--target", "cpu", "--precision", "int8"]
            command = [sys.executable, "-m", "edgelm", *export, "-o", str(bundle)]
            subprocess.run(command, check=True)
    chosen = [text for path in texts for text in read_texts(path)]
    chosen = chosen or load_texts(Calibration())
    if minutes is not None:
        result: dict[str, Any] = {"soak": soak(bundle, minutes, chosen)}
    else:
        names = [DIRECT, EDGELM] + ([INFINITY] if infinity else [])
        result = {
            "load": measure(names, bundle, infinity, clients, rounds, seconds, chosen)
        }
        print(table(result["load"]["found"]))
    if output is not None:
        output.write_text(
            json.dumps({"about": about(chosen), **result}, indent=1) + "\n"
        )


def measure(
    names: Sequence[str],
    bundle: Path,
    infinity: str | None,
    clients: Sequence[int],
    rounds: int,
    seconds: float,
    texts: Sequence[str],
) -> dict[str, Any]:
    """Every contender under every number of clients, in turns."""
    servers = {name: start(name, bundle, infinity) for name in names}
    for _, port in servers.values():  # warm
        asyncio.run(load(port, 8, 2.0, texts))
    found: dict[str, dict[str, Any]] = {}
    for count in clients:
        rates: dict[str, list[float]] = {name: [] for name in names}
        latencies: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(rounds):
            for name, (_, port) in servers.items():
                took, failed, whole = asyncio.run(load(port, count, seconds, texts))
                rates[name].append(len(took) / whole)
                latencies[name] += took
                if failed:
                    raise SystemExit(f"{name} answered {failed} requests with errors")
                line = f"{count} clients, {name}: {rates[name][-1]:.1f} requests/s"
                print(line, file=sys.stderr, flush=True)
        found[str(count)] = {
            name: {
                "per_s": round(median(rates[name]), 1),
                "times": round(
                    median(np.divide(rates[name], rates[DIRECT]).tolist()), 2
                ),
                **{
                    f"p{p}_ms": round(float(np.percentile(latencies[name], p)), 1)
                    for p in (50, 95, 99)
                },
                "by_round": [round(rate, 1) for rate in rates[name]],
            }
            for name in names
        }
    memory = {
        name: round(pss_mib(child.pid), 1) for name, (child, _) in servers.items()
    }
    for child, _ in servers.values():
        child.terminate()
        child.wait()
    return {"found": found, "memory_mib": memory}


def about(texts: Sequence[str]) -> dict[str, Any]:
    """Machine, versions and texts."""
    versions = {}
    for name in ("torch", "onnxruntime", "sentence-transformers", "fastapi", "uvicorn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "none"
    return {
        "cores": cores(),
        "machine": platform.processor() or platform.machine(),
        "versions": versions,
        "words_a_text": sum(len(text.split()) for text in texts) / len(texts),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
