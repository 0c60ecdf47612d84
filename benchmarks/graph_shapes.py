"""What shapes in a graph's file do to its speed: the same bundle with and without them, in turns.

    edgelm export minilm --target cpu --precision fp32 -o bundle
    python benchmarks/graph_shapes.py bundle

Given shapes of the tensors between its operators, ONNX Runtime's optimiser joins sums and layer norms
(SkipLayerNormalization) and biases and GELU; without them it does not.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import onnx

from edgelm import samples
from edgelm.bundle import open_bundle, seal
from edgelm.runtimes.engine import open_engine


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--rounds", default=15, show_default=True)
@click.option("--threads", type=int)
def main(bundle: Path, rounds: int, threads: int | None) -> None:
    """Print texts a second and the ms of one text, of both, and the median of the ratios."""
    texts = samples.calibration()[::6]
    with tempfile.TemporaryDirectory() as work:
        engines = {}
        for name in ("without shapes", "with shapes"):
            folder = Path(work) / name
            shutil.copytree(bundle, folder)
            opened = open_bundle(folder)
            path = folder / opened.manifest.graph.file
            proto = onnx.load(path)
            del proto.graph.value_info[:]
            if name == "with shapes":
                proto = onnx.shape_inference.infer_shapes(proto)
            onnx.save(proto, path)
            engines[name] = open_engine(seal(folder, opened.manifest), threads=threads)
        turns: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for _ in range(rounds + 1):
            for name, engine in engines.items():
                began = time.perf_counter()
                engine.run(engine.tokenize(texts))
                many = time.perf_counter() - began
                began = time.perf_counter()
                for text in texts[:20]:
                    engine.run(engine.tokenize([text]))
                one = time.perf_counter() - began
                turns[name].append((many / len(texts), one / 20))
    for name, measured in turns.items():
        many, one = (median(turn[i] for turn in measured[1:]) for i in (0, 1))
        print(f"{name}: {1 / many:.1f} texts/s, one text {one * 1e3:.2f} ms")
    pairs = list(zip(*turns.values(), strict=True))[1:]
    for i, what in enumerate(("all texts", "one text")):
        ratio = median(given[i] / bare[i] for bare, given in pairs)
        print(f"time with shapes / without, {what}: {ratio:.3f}")


if __name__ == "__main__":
    main()
