"""What a run needs to know before it searches: the dense model's quality and costs, and which layers int8 hurts."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgelm import schema
from edgelm.bundle import GRAPH
from edgelm.calibration import Calibration, load_texts
from edgelm.errors import InputError
from edgelm.evaluate.reference import from_loaded
from edgelm.export import export
from edgelm.export.precision import Named, by_sensitivity, feeds, write_graph
from edgelm.models import LoadedModel
from edgelm.targets import Target
from edgelm.tuning.costs import (
    CostModel,
    Layer,
    find_layers,
    measure_dense,
    measure_products,
    open_graph,
    runs_here,
)
from edgelm.tuning.space import Configuration, Values
from edgelm.tuning.trial import Problem, float_graph, judges_of, ranges_of

# Texts that are read at most, and of these every third to judge by.
MAX_TEXTS = 4096
# Texts that sensitivity is measured on (every eighth of these), and that time is measured on.
_SENSITIVITY, _TIMED = 256, 96


@dataclass(frozen=True)
class Baseline:
    """The dense model.

    Attributes:
        measure: What quality is, in words.
        quality: Of the dense model, 0..100, on what is tuned by.
        confirmed: The same on the rows that choose nothing.
        rows: How many rows there are to tune by, and to confirm by.
        extra_bytes: What a bundle takes besides its graph.
        costs: What configurations cost.
        groups: Names of the products that int8 may leave in float, the most sensitive first.
    """

    measure: str
    quality: float
    confirmed: float
    rows: tuple[int, ...]
    extra_bytes: int
    costs: CostModel
    groups: tuple[tuple[str, ...], ...]


def identity(loaded: LoadedModel) -> str:
    """What tells a model from others: its original weights, and what was done to them."""
    about = json.dumps([loaded.source_digest, loaded.steps], default=str)
    return hashlib.sha256(about.encode()).hexdigest()


def write_texts(texts: str, seed: int, work: Path) -> list[str]:
    """Write ``calibration.jsonl`` and ``judging.jsonl`` (every third text) into a folder.

    Args:
        texts: ``built-in`` or a file.
        seed: Of the draw, where there are more than `MAX_TEXTS`.
        work: The folder.

    Returns:
        The texts to judge by.

    Raises:
        InputError: The texts cannot be read, there are too few, or the folder cannot be written.
    """
    found = load_texts(Calibration(texts, MAX_TEXTS, seed=seed))
    judging = found[::3]
    if len(judging) < 16:
        raise InputError(
            f"{texts} holds {len(found)} texts; tuning needs at least 48. Give more with --texts FILE."
        )
    rest = [text for i, text in enumerate(found) if i % 3]
    for name, part in (("calibration", rest), ("judging", judging)):
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in part]
        try:
            (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        except OSError as error:
            raise InputError(f"Cannot write to {work}: {error.strerror}.") from error
    return judging


def measure_baseline(
    problem: Problem,
    space: Mapping[str, Values],
    loaded: LoadedModel,
    target: Target,
    texts: Sequence[str],
) -> Baseline:
    """Judge and measure the dense model.

    Args:
        problem: What is tuned.
        space: All that may be asked for.
        loaded: The dense model.
        target: The device.
        texts: Texts whose lengths are those that count.

    Raises:
        EdgelmError: The model cannot be exported for the target, or not be judged.
    """
    judge, confirm = judges_of(problem)
    dense = from_loaded(loaded)
    quality, confirmed = judge(dense), confirm(dense)
    if quality <= 0:
        raise InputError(
            f"The dense model's {judge.measure} is {quality:.2f}; there is nothing to keep. Give other data."
        )
    _, source = float_graph(problem, Configuration())
    layers = find_layers(loaded)
    extra, costs = _costs(problem, space, loaded, target, texts, source, layers)
    groups: list[tuple[Named, ...]] = []
    if "int8" in space["precision"] and max(space.get("floats", (0,))) > 0:
        few = replace(ranges_of(problem), max_texts=_SENSITIVITY)
        known = {(x.inputs, x.outputs) for x in layers}
        groups = [
            group
            for group in by_sensitivity(loaded, target, source, few)
            if known.issuperset(shape for _, shape in group)
        ]
    dims = tuple(tuple(shape for _, shape in group) for group in groups)
    names = tuple(tuple(name for name, _ in group) for group in groups)
    counts = (len(judge.rows), len(confirm.rows))
    costs = replace(costs, groups=dims)
    return Baseline(judge.measure, quality, confirmed, counts, extra, costs, names)


def _costs(
    problem: Problem,
    space: Mapping[str, Values],
    loaded: LoadedModel,
    target: Target,
    texts: Sequence[str],
    source: Path,
    layers: tuple[Layer, ...],
) -> tuple[int, CostModel]:
    """Bytes of a bundle besides its graph; sizes and times of the dense model and of products."""
    ranges, here = ranges_of(problem), runs_here(target)
    given = list(feeds(loaded, texts[:: max(len(texts) // _TIMED, 1)], ranges))
    given.sort(key=_tokens)
    usual, long = given[len(given) // 2], given[int(0.95 * len(given))]
    sizes: dict[str, float] = {}
    times: dict[str, float] = {}
    products: dict[str, float] = {}
    tail = 1.0
    with tempfile.TemporaryDirectory(dir=problem.work, prefix=".dense.") as work:
        bundle = export(
            loaded,
            target.name,
            Path(work) / "bundle",
            precision=space["precision"][0],
            float_graph=source,
            calibration=ranges,
        )
        graph = bundle.file(bundle.manifest.graph.file)
        extra = bundle.size_bytes - graph.stat().st_size
        for precision in space["precision"]:
            several = space.get("table_bits", (8,)) if precision == "int8" else (8,)
            for bits in several:
                name = f"{precision}/{bits}"
                folder = Path(work) / f"{precision}-{bits}"
                folder.mkdir()
                made = (loaded, target, precision, source, folder, ranges)
                write_graph(*made, table_bits=bits)
                size = sum(file.stat().st_size for file in folder.iterdir())
                sizes[name] = (extra + size) / 1e6
            if here:
                runtime = open_graph(target, folder / GRAPH).runtime
                times[precision], slow = (
                    measure_dense(
                        bundle,
                        folder / GRAPH,
                        feed,
                        f"{identity(loaded)}:{precision}:{_tokens(feed)}",
                        runtime,
                    )
                    for feed in (usual, long)
                )
                tail = max(tail, slow / times[precision])
        if here:
            shapes = _shapes(layers, space)
            products = measure_products(bundle, shapes, _tokens(usual), runtime)
    return extra, CostModel(layers, _tokens(usual), products, times, tail, sizes)


def _tokens(feed: Mapping[str, Any]) -> int:
    """Tokens of a text, special ones included."""
    return int(feed["input_ids"].size)


def _shapes(
    layers: Sequence[Layer], space: Mapping[str, Values]
) -> set[tuple[int, int]]:
    """Every shape that a product of a configuration can have."""
    return {
        layer.shape(Configuration(neurons=neurons, heads=heads))
        for layer in layers
        for neurons in space.get("neurons", (1.0,))
        for heads in space.get("heads", (1.0,))
    }


def read_baseline(data: Any) -> Baseline:
    """A baseline from a journal."""
    return schema.build(Baseline, data, "The journal's baseline", InputError)
