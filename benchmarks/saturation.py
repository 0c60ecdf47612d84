"""What products of int8 that cannot saturate cost in ONNX Runtime, where a CPU does not need them.

    python benchmarks/saturation.py BUNDLE --rounds 20

Opens the graph of an int8 bundle twice, without and with `session.x64quantprecision`, one thread, and runs both by
turns on 16 inputs of 32 tokens. Prints the medians, the median of the rounds' ratios, and how far the outputs
differ. A CPU without VNNI needs the option (`edgelm.runtimes.session.saturates`); there the
difference is what it mends.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnxruntime

from edgelm.bundle import open_bundle
from edgelm.runtimes.workers import cpu_name


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", default=20, show_default=True)
def main(bundle: Path, rounds: int) -> None:
    """Measure and print."""
    opened = open_bundle(bundle)
    graph = str(opened.file(opened.manifest.graph.file))
    sessions = []
    for value in ("0", "1"):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.x64quantprecision", value)
        sessions.append(onnxruntime.InferenceSession(graph, options))
    ids = np.random.default_rng(0).integers(1000, 20000, (16, 32))
    every = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    feeds = {tensor.name: every[tensor.name] for tensor in opened.manifest.graph.inputs}
    plain, exact = (session.run(None, feeds)[0] for session in sessions)
    times: list[list[float]] = []
    for _ in range(rounds):
        row = []
        for session in sessions:
            began = time.perf_counter()
            session.run(None, feeds)
            row.append(1e3 * (time.perf_counter() - began))
        times.append(row)
    off, on = (median(column) for column in zip(*times, strict=True))
    ratio = median(b / a for a, b in times)
    click.echo(
        f"{cpu_name()}, ONNX Runtime {onnxruntime.__version__}: {off:.1f} ms without, {on:.1f} ms with, "
        f"{ratio:.2f} times as long; outputs differ by at most {np.abs(plain - exact).max():.2g}"
    )


if __name__ == "__main__":
    main()
