"""What the presets cost and bring: quality, latency and size of minilm, as a table and a plot.

    python benchmarks/presets.py --work presets --stsb stsb/test.jsonl -o presets.json --plot docs/presets.svg

Dense and each preset, float32 and int8, in ONNX Runtime and OpenVINO. All bundles take turns in one run
(`edgelm bench`'s own measurement); quality is measured on the bundles themselves.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from edgelm import samples
from edgelm.evaluate.accuracy import evaluate, load_dataset
from edgelm.evaluate.latency import Workload, benchmark
from edgelm.recipe import PRESETS
from edgelm.reports.charts import scatter
from edgelm.runtimes import load

# Short name of what runs a bundle: its target and precision.
RUNS = {
    "fp32": ("cpu", "fp32"),
    "int8": ("cpu", "int8"),
    "int8 OpenVINO": ("cpu-openvino", "int8"),
}


def prepare(work: Path) -> dict[str, Path]:
    """Make the bundles that are not there yet; gives them by name."""

    def edgelm(*arguments: str) -> None:
        subprocess.run([sys.executable, "-m", "edgelm", *arguments], check=True)

    work.mkdir(parents=True, exist_ok=True)
    bundles = {}
    for model in ("dense", *PRESETS):
        source = work / model
        if model != "dense" and not source.exists():
            edgelm("compress", "minilm", "-o", str(source), "--preset", model)
        for run, (target, precision) in RUNS.items():
            bundle = bundles[f"{model} {run}"] = work / f"{model} {run}"
            if not bundle.exists():
                name = "minilm" if model == "dense" else str(source)
                options = ["--target", target, "--precision", precision]
                edgelm("export", name, "-o", str(bundle), *options)
    return bundles


def front(rows: list[dict[str, Any]]) -> list[str]:
    """Names of the rows that no other beats in both quality and latency."""
    return [
        row["name"]
        for row in rows
        if not any(
            other["quality"] >= row["quality"] and other["ms"] < row["ms"]
            for other in rows
        )
    ]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--stsb", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--plot", type=click.Path(path_type=Path), help="SVG to write.")
def main(work: Path, stsb: Path, rounds: int, output: Path, plot: Path | None) -> None:
    """Measure; print a table, write JSON and the plot."""
    bundles = prepare(work)
    data = load_dataset(stsb)
    texts = tuple(samples.calibration()[:256])
    timed = benchmark([str(b) for b in bundles.values()], Workload(texts, rounds))
    rows: list[dict[str, Any]] = []
    for (name, bundle), found in zip(bundles.items(), timed["contenders"], strict=True):
        quality = next(iter(evaluate(load(bundle), data).values()))
        rows.append(
            {
                "name": name,
                "quality": quality,
                "ms": found["p50_ms"],
                "texts_per_second": found["texts_per_s"],
                "mb": found["size_mb"],
            }
        )
    best = front(rows)
    click.echo(
        "| | STS-B | p50 ms, one text | texts/s | MB | |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        mark = "on the front" if row["name"] in best else ""
        click.echo(
            f"| {row['name']} | {row['quality']:.2f} | {row['ms']:.2f} | "
            f"{row['texts_per_second']:.0f} | {row['mb']:.1f} | {mark} |"
        )
    about = {"environment": timed["environment"], "front": best, "rows": rows}
    output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if plot is not None:
        points = [(row["name"], row["ms"], row["quality"], row["mb"]) for row in rows]
        picture = scatter(
            "STS-B against latency; the size of a point is the bundle's",
            "milliseconds for one text, median",
            "Spearman x 100",
            points,
            front=best,
        )
        plot.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
