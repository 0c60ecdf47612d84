"""What compression costs in quality: methods x amounts, on test splits.

    python benchmarks/quality.py sparsify --data stsb/test.jsonl -o sparsity.json
    python benchmarks/quality.py shrink --data stsb/test.jsonl -o shrink.json
    python benchmarks/quality.py factorllm --data stsb/test.jsonl -o factorllm.json
    python benchmarks/quality.py sparsify --model minilm-ner --data wikigold-test.jsonl -o ner.json
    python benchmarks/quality.py sparsify --model lm --data wikitext2/test.txt -o lm.json

Calibration is edgelm's built-in sample unless --calibration names a file; it is never the data that
is measured on. A data set is a file or folder that `edgelm eval` takes; for a language model, such as
`examples/train_lm.py` makes, plain text, and the measure is its perplexity a token. Every row runs in this process,
in PyTorch and float32, on a fresh copy of the model. `--documents 500` judges retrieval on a part of the corpus: an
encoder spends minutes on a whole one for every cell.
"""

from __future__ import annotations

import json
import math
import platform
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from edgelm.calibration import Calibration, load_texts
from edgelm.compress import Blocks, Shrink, Sparsify, compress
from edgelm.compress.factorllm import FactorLLM, factorize_
from edgelm.evaluate.accuracy import evaluate, load_dataset
from edgelm.evaluate.data import Dataset
from edgelm.evaluate.reference import from_loaded
from edgelm.models import LoadedModel, load_model
from edgelm.pipeline import calibration_sets

# Name of a row -> settings of Sparsify beside the pattern. DSnoT as its authors publish it, faithful and
# without a bias, has rows of its own.
SPARSIFY: dict[str, dict[str, Any]] = {
    "magnitude": {"saliency": "magnitude", "refine": "none", "repair": "none"},
    "wanda": {"saliency": "wanda", "refine": "none", "repair": "none"},
    "ria": {"saliency": "ria", "refine": "none", "repair": "none"},
    "wanda, dsnot faithful": {
        "refine": "dsnot",
        "repair": "none",
        "dsnot": {"mode": "faithful"},
    },
    "wanda, dsnot": {"refine": "dsnot", "repair": "none"},
    "wanda, bias": {"refine": "none", "repair": "bias"},
    "wanda, dsnot, bias": {"refine": "dsnot", "repair": "bias"},
    "wanda, swaps, bias": {"refine": "swaps", "repair": "bias"},
    "sparsegpt": {"saliency": "sparsegpt", "refine": "none", "repair": "sparsegpt"},
    "wanda, admm": {"refine": "none", "repair": "admm"},
    "wanda, dsnot, admm": {"refine": "dsnot", "repair": "admm"},
    "wanda, swaps, admm": {"refine": "swaps", "repair": "admm"},
    "admm, admm": {"refine": "admm", "repair": "admm"},
    "auto (the default)": {},
    "auto, owl": {"allocation": "owl"},
    "auto, progressive": {"allocation": "progressive"},
    "auto, permuted": {"permute": True},
}
SHRINK: dict[str, dict[str, Any]] = {
    "neurons, variance, no drift": {"score": "variance", "drift": 0.0},
    "neurons, variance": {"score": "variance"},
    "neurons, no drift": {"drift": 0.0},
    "neurons (the default)": {},
    "neurons, auto": {"allocation": "auto"},
    "heads": {"part": "heads"},
}
# FactorLLM of 8 experts, so many of them active.
FACTORLLM: dict[str, dict[str, Any]] = {
    "contiguous, router alone": {"objective": "router"},
    "contiguous, adapted": {},
    "permuted, adapted": {"split": "permuted"},
    "contiguous, adapted by the language model's loss": {"objective": "lm"},
}
# Step -> its config, the setting that a column stands for, columns, rows.
TABLES: dict[str, tuple[type[Any], str, str, dict[str, dict[str, Any]]]] = {
    "sparsify": (Sparsify, "sparsity", "0.5,0.6,0.7,2:4,4:8", SPARSIFY),
    "shrink": (Shrink, "keep", "0.75,0.5,0.25", SHRINK),
    "factorllm": (FactorLLM, "active", "6,4,2", FACTORLLM),
}


def step(table: str, amount: str, settings: dict[str, Any]) -> Any:
    """The config of a cell."""
    from edgelm.errors import ConfigError
    from edgelm.schema import build

    config, setting, *_ = TABLES[table]
    number = int if amount.isdigit() else float
    value = amount if ":" in amount else number(amount)
    return build(config, {setting: value, **settings}, "benchmark", ConfigError)


def measure(
    loaded: LoadedModel, data: dict[str, Path], others: int | None
) -> dict[str, float]:
    """The measure that counts of each data set: in percent, or perplexity."""
    if loaded.task == "lm":
        return {name: perplexity(loaded, path) for name, path in data.items()}
    model = from_loaded(loaded)
    found = {}
    for name, path in data.items():
        chosen = part(load_dataset(path), others)
        found[name] = next(iter(evaluate(model, chosen).values()))
    return found


def part(data: Dataset, others: int | None) -> Dataset:
    """Of a retrieval data set the judged documents and so many others, drawn by a fixed seed."""
    if others is None or data.relevance is None:
        return data
    judged = {one for grades in data.relevance.values() for one in grades}
    rest = [i for i, d in enumerate(data.documents) if str(d["id"]) not in judged]
    drawn = set(random.Random(0).sample(rest, min(others, len(rest))))
    kept = [
        d for i, d in enumerate(data.documents) if str(d["id"]) in judged or i in drawn
    ]
    return replace(data, documents=kept)


def perplexity(loaded: LoadedModel, path: Path) -> float:
    """``exp`` of the mean cross entropy a token, in windows of 256 that do not overlap."""
    ids = loaded.tokenizer(path.read_text(encoding="utf-8"))["input_ids"]
    window = min(256, loaded.max_length)
    rows = torch.tensor(ids[: len(ids) // window * window]).reshape(-1, window)
    total = 0.0
    with torch.inference_mode():
        for batch in rows.split(16):
            total += float(loaded.model(input_ids=batch, labels=batch).loss) * len(
                batch
            )
    return math.exp(total / len(rows))


def markdown(
    rows: dict[str, dict[str, float]], known: dict[str, dict[str, Any]], name: str
) -> str:
    """The results on one data set: a line a method, a column an amount."""
    split_keys = [
        key.split("  ") for key in rows if key != "dense" and name in rows[key]
    ]
    patterns = list(dict.fromkeys(pattern for pattern, _ in split_keys))
    methods = [m for m in known if any(m == method for _, method in split_keys)]
    lines = [f"| {name} | {' | '.join(patterns)} |", "|---" * (len(patterns) + 1) + "|"]
    for method in methods:
        found = [rows.get(f"{p}  {method}", {}).get(name) for p in patterns]
        cells = ["" if value is None else f"{value:.2f}" for value in found]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return f"dense: {rows['dense'][name]:.2f}\n\n" + "\n".join(lines)


@click.command()
@click.argument("table", type=click.Choice(list(TABLES)))
@click.option("--model", default="minilm", show_default=True)
@click.option(
    "--data", multiple=True, required=True, help="NAME=PATH or PATH; repeatable."
)
@click.option("--amounts", help="Columns, by , (default: all).")
@click.option("--methods", help="Rows to run, by ; (default: all).")
@click.option("--calibration", default="built-in", show_default=True)
@click.option("--max-texts", default=Calibration.max_texts, show_default=True)
@click.option(
    "--documents",
    type=click.IntRange(0),
    help="Of a retrieval data set: its judged documents and so many others (default: all).",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    table: str,
    model: str,
    data: tuple[str, ...],
    amounts: str | None,
    methods: str | None,
    calibration: str,
    max_texts: int,
    documents: int | None,
    output: Path,
) -> None:
    """Measure; print a table, write JSON. Rows that OUTPUT has already are not run again."""
    named = [d.partition("=")[::2] if "=" in d else (Path(d).stem, d) for d in data]
    datasets = {name: Path(path) for name, path in named}
    found = json.loads(output.read_text()) if output.exists() else {"rows": {}}
    found["about"] = {
        "model": model,
        "data": dict(named),
        "calibration": calibration,
        "max_texts": max_texts,
        "documents": documents,
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
    }
    rows = found["rows"]

    def record(key: str, loaded: LoadedModel, seconds: float) -> None:
        scores = measure(loaded, datasets, documents)
        rows[key] = {**rows.get(key, {}), **scores, "seconds": round(seconds, 1)}
        output.write_text(json.dumps(found, indent=1) + "\n")
        shown = "  ".join(f"{name} {value:.2f}" for name, value in scores.items())
        click.echo(f"{key:32} {shown}  {seconds:.0f} s")

    def due(key: str) -> bool:
        return not set(datasets) <= set(rows.get(key, {}))

    if due("dense"):
        record("dense", load_model(model), 0.0)
    settled = Calibration(texts=calibration, max_texts=max_texts)
    texts = load_texts(settled)
    *_, columns, known = TABLES[table]
    language_model = load_model(model).task == "lm"
    for amount in (amounts or columns).split(","):
        for name in methods.split(";") if methods else known:
            key, settings = f"{amount}  {name}", known[name]
            if "permute" in settings and ":" not in amount:
                continue
            if table == "sparsify" and "allocation" in settings and ":" in amount:
                continue
            if settings.get("objective") == "lm" and not language_model:
                continue
            if not due(key):
                continue
            began = time.monotonic()
            loaded = load_model(model)
            blocks = Blocks(loaded.model)
            parts = calibration_sets(loaded, blocks, texts, settled)
            wanted = step(table, amount, settings)
            if isinstance(wanted, FactorLLM):
                factorize_(loaded.model, parts[0], wanted)
            else:
                compress(blocks, [wanted], *parts)
            record(key, loaded, time.monotonic() - began)
    for name in datasets:
        click.echo(f"\n{markdown(rows, known, name)}")


if __name__ == "__main__":
    main()
