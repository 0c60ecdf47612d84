"""Several targets for the same machine: measured here, side by side; the fastest is kept."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from edgelm.atomic import new_folder
from edgelm.bundle import GRAPH, MANIFEST, Bundle, seal
from edgelm.errors import MissingExtraError
from edgelm.export.exporter import export
from edgelm.export.graph import export_graph
from edgelm.export.routed import check_routed
from edgelm.golden import load_golden
from edgelm.models import LoadedModel
from edgelm.runtimes.engine import Engine, cores, open_engine
from edgelm.targets import load_target

_ROUNDS = 5


def export_fastest(
    loaded: LoadedModel,
    targets: Sequence[str],
    path: Path,
    *,
    force: bool = False,
    token_embeddings: int | None = None,
    **options: Any,
) -> tuple[Bundle, dict[str, float]]:
    """Export for each target, measure the bundles in turns, keep the fastest.

    Args:
        loaded: The model.
        targets: Targets for the machine that this runs on, of one opset. One whose
            runtime is not installed here is passed over, but for the first.
        path: The folder to make.
        force: Replace a bundle that is there already.
        token_embeddings: As for `edgelm.export.export`.
        **options: As for `edgelm.export.export`.

    Returns:
        The bundle, and the texts a second of each target that was measured: the
        golden texts, a worker for each core. Its manifest records them.

    Raises:
        EdgelmError: Whatever `edgelm.export.export` refuses.
    """
    for name in targets:
        asked = options.get("precision", "auto")
        check_routed(loaded, load_target(name), "fp32" if asked == "auto" else asked)
    with (
        new_folder(path, marker=MANIFEST, force=force) as folder,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=".rivals.") as work,
    ):
        made: dict[str, Bundle] = {}
        source = Path(work) / "float" / GRAPH
        source.parent.mkdir()
        opset = load_target(targets[0]).opset
        export_graph(loaded, source, opset, token_embeddings=token_embeddings)
        for name in targets:
            try:
                made[name] = export(
                    loaded,
                    name,
                    Path(work) / name,
                    float_graph=source,
                    token_embeddings=token_embeddings,
                    **options,
                )
            except MissingExtraError:
                if name == targets[0]:
                    raise
        rates = _measure(made)
        best = made[max(rates, key=rates.__getitem__)]
        shutil.copytree(best.path, folder, dirs_exist_ok=True)
        provenance = {**best.manifest.provenance, "texts_per_second": rates}
        bundle = seal(folder, replace(best.manifest, provenance=provenance))
    return Bundle(path, bundle.manifest), rates


def _measure(bundles: dict[str, Bundle]) -> dict[str, float]:
    """Median texts a second of each, taking turns."""
    opened = {name: open_engine(b, workers=cores()) for name, b in bundles.items()}
    examples = load_golden(next(iter(bundles.values()))) * 4
    texts = [example.text for example in examples]
    pairs = [example.pair or "" for example in examples]
    paired = examples[0].pair is not None

    def rate(engine: Engine) -> float:
        began = time.perf_counter()
        engine.run(engine.tokenize(texts, pairs if paired else None))
        return len(texts) / (time.perf_counter() - began)

    for engine in opened.values():
        rate(engine)
    turns = [
        {name: rate(engine) for name, engine in opened.items()} for _ in range(_ROUNDS)
    ]
    return {name: round(median(turn[name] for turn in turns), 1) for name in opened}
