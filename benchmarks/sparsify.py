"""How long sparsification takes: fast against faithful DSnoT, the other steps, and the whole command.

    python benchmarks/sparsify.py -o sparsify.json
    python benchmarks/sparsify.py --skip-faithful --size 1024

One layer of random weights and inputs with outlier features, the statistics ready; every contender in
turn, in one process, several rounds. `faithful` is the published algorithm, cycle by cycle.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch

from edgelm.calibration import Calibration
from edgelm.compress import Sparsify
from edgelm.compress.dsnot import Dsnot, refine_faithful, refine_fast
from edgelm.compress.patterns import make_mask, parse_pattern
from edgelm.compress.saliency import wanda
from edgelm.compress.sparsify import REFINEMENTS, REPAIRS, Layer
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe
from edgelm.statistics import ActivationStatistics


def layer(size: int) -> Layer:
    """A square layer whose inputs have means and outliers, as those of language models do."""
    torch.manual_seed(0)
    weight = torch.randn(size, size) * 0.02
    inputs = torch.randn(16, 128, size) * torch.rand(size).mul(3).exp() * 0.3
    inputs += 0.3 * torch.randn(size)
    statistics = ActivationStatistics.of(inputs, torch.ones(16, 128), gram=True)
    return Layer(weight, False, statistics, statistics)


def time_layer(
    size: int, rounds: int, faithful: bool, slow: bool
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round, by pattern and contender."""
    subject = layer(size)
    seconds: dict[str, dict[str, list[float]]] = {}
    for text in ("0.6", "2:4"):
        pattern = parse_pattern(text)
        config = Sparsify(sparsity=text if ":" in text else float(text))
        saliency = wanda(subject.weight, subject.fit)
        keep = make_mask(saliency, pattern)
        arguments = (subject.weight, keep, saliency, subject.fit, pattern, Dsnot())
        contenders: dict[str, Any] = {"dsnot fast": lambda a=arguments: refine_fast(*a)}
        if faithful:
            contenders["dsnot faithful"] = lambda a=arguments: refine_faithful(*a)
        contenders["first mask"] = lambda p=pattern: make_mask(
            wanda(subject.weight, subject.fit), p
        )
        if slow:
            for name in ("admm", "sparsegpt"):
                contenders[name] = lambda n=name, k=keep, p=pattern, c=config: REPAIRS[
                    n
                ](subject, k, p, c)
            contenders["swaps"] = lambda k=keep, s=saliency, p=pattern, c=config: (
                REFINEMENTS["swaps"](subject, k, s, p, c)
            )
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, run in contenders.items():
                began = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - began)
        seconds[text] = times
    return seconds


@click.command()
@click.option(
    "--size", default=4096, show_default=True, help="Width and height of the layer."
)
@click.option("--rounds", default=3, show_default=True)
@click.option("--skip-faithful", is_flag=True)
@click.option(
    "--all-steps", is_flag=True, help="Time swaps and repairs too; minutes at 4096."
)
@click.option("--skip-model", is_flag=True, help="Do not time the whole command.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="JSON to write.")
def main(
    size: int,
    rounds: int,
    skip_faithful: bool,
    all_steps: bool,
    skip_model: bool,
    output: Path | None,
) -> None:
    """Time; print medians, and ratios to `faithful` of the same round."""
    found: dict[str, Any] = {
        "size": size,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.platform(),
        "seconds": time_layer(size, rounds, not skip_faithful, all_steps),
    }
    for pattern, times in found["seconds"].items():
        for name, values in times.items():
            against = times.get("dsnot faithful", values)
            ratio = median(a / b for a, b in zip(against, values, strict=True))
            shown = (
                f"   {ratio:6.1f} x faithful"
                if name == "dsnot fast" and not skip_faithful
                else ""
            )
            click.echo(
                f"{size}x{size} {pattern:4} {name:15} {median(values):8.3f} s{shown}"
            )
    if not skip_model:
        recipe = Recipe(Calibration(max_texts=256), (Sparsify(sparsity="2:4"),))
        with tempfile.TemporaryDirectory() as folder:
            report = compress_model("minilm", recipe, Path(folder) / "checkpoint")
        found["compress minilm 2:4, seconds"] = report.cost["seconds"]
        click.echo(
            f"compress minilm --sparsity 2:4 --max-texts 256: {report.cost['seconds']:.1f} s"
        )
    if output:
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
