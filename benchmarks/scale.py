"""How the cost of compressing, searching and embedding grows, in CPU seconds, which other load does not stretch.

    python benchmarks/scale.py --work scale -o scale.json

- texts: `minilm`, half of the feed-forward neurons removed, by the number of calibration texts;
- model: random BERTs of two blocks and growing width, the same step, on the same texts;
- documents: embedded by the int8 bundle of `minilm`, one thread;
- trials: what the search itself takes, its evaluations answered from thin air.

Each is fitted by a power law (least squares in logarithms); its exponent is the slope.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from edgelm import samples
from edgelm.calibration import text_digest
from edgelm.export import export
from edgelm.models import load_model
from edgelm.pipeline import compress_model
from edgelm.recipe import parse_recipe
from edgelm.runtimes import load
from edgelm.targets import load_target
from edgelm.tuning.costs import Costs
from edgelm.tuning.search import Limits, search
from edgelm.tuning.space import Configuration, presets, space_for

TEXTS = (32, 64, 128, 256)
WIDTHS = (128, 256, 512)
DOCUMENTS = (128, 256, 512)
TRIALS = (16, 32, 64)


def cpu_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The exponent of a power law through points."""
    x, y = np.log(np.asarray(points, float)).T
    return float(np.polyfit(x, y, 1)[0])


def compress(model: str, texts: int, output: Path) -> None:
    calibration = {"max_texts": texts, "max_tokens": 128}
    step = {"method": "shrink", "part": "neurons", "keep": 0.5}
    data = {"calibration": calibration, "steps": [step]}
    compress_model(model, parse_recipe(data, "scale"), output, force=True)


def random_bert(width: int, folder: Path) -> int:
    """Write a BERT of two blocks with minilm's tokenizer; gives the weights of its blocks."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = load_model("minilm").tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=width // 32,
        intermediate_size=4 * width,
    )
    model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.encoder.parameters())


def search_alone(trials: int) -> None:
    space = space_for(load_target("cpu"), "bert", table_bits=True)

    def quality(c: Configuration) -> float:
        return 90 - 2 * (1 - c.neurons) ** 2 - 5 * (1 - c.heads) - c.weight_bits / 99

    def evaluate(jobs: Sequence[Any]) -> list[Mapping[str, Any]]:
        noise = random.Random(text_digest(str(job) for job in jobs))
        return [{"quality": quality(c) + noise.uniform(-0.1, 0.1)} for c, _ in jobs]

    def costs(c: Configuration) -> Costs:
        return Costs(c.neurons + c.heads, 2.0, c.neurons * c.weight_bits)

    search(space, presets(space), costs, evaluate, 90.0, Limits(1.0), trials=trials)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(work: Path, output: Path) -> None:
    """Measure; print tables and slopes, write JSON."""
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[float, float]]] = {}

    def measure(what: str, amount: float, job: Callable[[], Any]) -> None:
        found.setdefault(what, []).append((amount, cpu_seconds(job)))
        click.echo(f"{what} {amount:.0f}: {found[what][-1][1]:.2f} s of CPU")

    compress("minilm", 8, work / "compressed")  # imports are not what is measured
    for texts in TEXTS:
        measure("texts", texts, lambda n=texts: compress("minilm", n, work / "c"))
    for width in WIDTHS:
        folder = work / f"bert-{width}"
        weights = random_bert(width, folder)
        name = str(folder)
        measure("weights", weights, lambda n=name: compress(n, 64, work / "c"))
    bundle = work / "bundle"
    if not bundle.exists():
        export(load_model("minilm"), "cpu", bundle, precision="int8")
    embedder = load(bundle, threads=1)
    corpus = samples.calibration()
    for documents in DOCUMENTS:
        some = corpus[:documents]
        measure("documents", documents, lambda t=some: embedder.encode(t))
    for trials in TRIALS:
        measure("trials", trials, lambda n=trials: search_alone(n))
    slopes = {what: slope(points) for what, points in found.items()}
    for what, value in slopes.items():
        click.echo(f"{what}: CPU seconds grow with the power {value:.2f}")
    result = {"measured": found, "slopes": slopes}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
