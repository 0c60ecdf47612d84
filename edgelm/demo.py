"""The whole line once, on all three tasks: what `edgelm demo` and `make demo` show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import edgelm
from edgelm import samples
from edgelm.bundle import open_bundle
from edgelm.calibration import Calibration
from edgelm.compress import Sparsify
from edgelm.evaluate import accuracy
from edgelm.evaluate.contender import open_any
from edgelm.evaluate.latency import Workload, benchmark
from edgelm.export import export
from edgelm.golden import load_golden
from edgelm.models import load_model
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe
from edgelm.runtimes import Embedder, EntityRecognizer, Model, Scorer
from edgelm.runtimes.engine import open_engine
from edgelm.runtimes.verification import verify

Say = Callable[[str], None]

MODELS = ("minilm", "minilm-ner", "minilm-similarity")
# Few texts: a first look should not take long.
RECIPE = Recipe(
    Calibration(max_texts=256),
    (Sparsify(sparsity=0.5, refine="admm", repair="admm"),),
)
_SENTENCES = (
    "Ada Lovelace wrote about Babbage's engine in London.",
    "The ferry from Tallinn to Helsinki was cancelled by the Baltic Shipping Company.",
)
_PAIRS = (
    ("A man is playing a flute.", "Someone plays a wind instrument."),
    ("A man is playing a flute.", "The shop closes at six on Sundays."),
)
_QUESTION = "How do I stop my bread from going stale?"


@dataclass(frozen=True)
class Row:
    """One line of the table at the end."""

    model: str
    size_mb: float
    p50_ms: float
    texts_per_s: float
    quality: str


def run(folder: Path, say: Say) -> list[Row]:
    """Compress, export, verify and run the three built-in models, and compare.

    Args:
        folder: Where checkpoints and bundles go; it must not exist.
        say: Prints a line.

    Returns:
        The table: each dense model and its bundle.
    """
    rows: list[Row] = []
    for name in MODELS:
        checkpoint, bundle = folder / f"{name}-sparse", folder / f"{name}-bundle"
        say(f"\n== {name}")
        say(
            "compress: half of the weights of every linear layer to zero, the rest solved for anew; no training"
        )
        report = compress_model(name, RECIPE, checkpoint)
        worst = max(report.layers, key=lambda row: float(row["error"]))
        say(
            f"  {len(report.layers)} layers in {report.cost['seconds']:.0f} s; the largest output error is "
            f"{100 * worst['error']:.1f} %, in {worst['layer']}"
        )
        say(
            "export: an ONNX graph with int8 weights, the tokenizer and golden examples in one folder"
        )
        made = export(load_model(str(checkpoint)), "cpu", bundle)
        say(f"  {bundle.name}: {made.size_bytes / 1e6:.1f} MB")
        say(
            "verify: every file by its digest, every golden example against the original model"
        )
        opened = open_bundle(bundle)
        found = verify(open_engine(opened), load_golden(opened))
        say(f"  {found.examples} examples agree to {found.snr_db:.1f} dB")
        say("run: no torch from here on")
        _show(edgelm.load(bundle), say)
        rows += _compare(name, bundle, say)
    return rows


def _show(model: Model, say: Say) -> None:
    if isinstance(model, EntityRecognizer):
        for text, entities in zip(_SENTENCES, model.extract(_SENTENCES), strict=True):
            say(f"  {text}")
            say(
                "    "
                + ", ".join(f"{e.text} {e.label} {e.score:.2f}" for e in entities)
            )
    elif isinstance(model, Scorer):
        for (first, second), score in zip(_PAIRS, model.score(_PAIRS), strict=True):
            say(f"  {score:.2f}  {first} | {second}")
    elif isinstance(model, Embedder):
        documents = [row for row in samples.search() if row["type"] == "document"]
        vectors = model.encode([row["text"] for row in documents])
        scores = vectors @ model.encode([_QUESTION])[0]
        say(f"  search {len(documents)} texts for: {_QUESTION}")
        for i in np.argsort(-scores)[:3]:
            say(f"    {scores[i]:.2f}  {documents[i]['title']}")


def _compare(name: str, bundle: Path, say: Say) -> list[Row]:
    say("measure: the bundle against the dense model in PyTorch, taking turns")
    texts = tuple(samples.calibration()[::13])
    result = benchmark([str(bundle), name], Workload(texts, rounds=3, single=20))
    rows = []
    for contender, label in zip(
        result["contenders"], (f"{name} bundle", name), strict=True
    ):
        rows.append(
            Row(
                label,
                contender["size_mb"],
                contender["p50_ms"],
                contender["texts_per_s"],
                _quality(contender["name"]),
            )
        )
    return rows[::-1]


def _quality(reference: str) -> str:
    model: Any = open_any(reference)
    parts = []
    for data in accuracy.built_in(model):
        measure, value = next(iter(accuracy.evaluate(model, data).items()))
        parts.append(f"{measure} {value:.1f}")
    return ", ".join(parts)
