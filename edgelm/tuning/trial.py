"""One evaluation: a configuration made and judged. This is what runs on the workers.

Every evaluation depends on the problem and the configuration alone, in one thread, so that it gives the same
number here and on a cluster, the first time and again. What it leaves behind under ``work`` (checkpoints and
float32 graphs, by recipe) only spares work.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from edgelm import recipe as recipes
from edgelm.bundle import GRAPH
from edgelm.calibration import Calibration, read_texts
from edgelm.errors import EdgelmError, InputError
from edgelm.models import LoadedModel, load_model
from edgelm.targets import load_target
from edgelm.tasks import Task
from edgelm.tuning.quality import Judge, judges
from edgelm.tuning.space import Configuration

Fidelity = Literal["partial", "full"]
# What a partial evaluation has: a share of the texts to calibrate on, and at most so many rows to judge by.
_SHARE, _ROWS = 1 / 8, 128
MAX_TOKENS = 128


@dataclass(frozen=True)
class Problem:
    """What is tuned; workers get it once.

    Attributes:
        model: A built-in name, a folder or a hub id.
        task: Its task; inferred if None.
        target: Name of a target.
        work: Folder that all workers see: it holds ``calibration.jsonl`` and ``judging.jsonl``.
        data: Labelled data, or None.
        seed: Of the draw of calibration texts.
        texts: How many texts to calibrate on in a whole evaluation, which is also what the bundle is made of.
        groups: Names of the products that int8 may leave in float, the most sensitive first.
    """

    model: str
    task: Task | None
    target: str
    work: str
    data: str | None
    seed: int
    texts: int = 512
    groups: tuple[tuple[str, ...], ...] = ()


def recipe_of(
    problem: Problem, configuration: Configuration, texts: int
) -> recipes.Recipe:
    """The recipe of a configuration, calibrated on so many texts."""
    calibration = {
        "texts": str(Path(problem.work) / "calibration.jsonl"),
        "max_texts": texts,
        "max_tokens": MAX_TOKENS,
        "seed": problem.seed,
    }
    data = {"calibration": calibration, "steps": configuration.steps}
    return recipes.parse_recipe(data, configuration.name)


def evaluate_trial(
    problem: Problem, configuration: Configuration, fidelity: Fidelity
) -> dict[str, Any]:
    """Make a configuration and judge it.

    Args:
        problem: What is tuned.
        configuration: What to make.
        fidelity: ``partial``: the recipe alone, in PyTorch, on few texts; ``full``: the graph in its precision.

    Returns:
        ``quality`` and ``seconds``, and for a whole evaluation ``graph_bytes``; or ``error``, a sentence.

    Raises:
        InputError: The disk is full: nothing that the configuration is to blame for.
    """
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    try:
        judged = _partial if fidelity == "partial" else _full
        found = judged(problem, configuration)
    except Exception as error:
        if _disk_full(error):
            raise InputError(
                f"No space is left on the disk of {problem.work}. Free some; the same command goes on where it stopped."
            ) from error
        lines = str(error).strip().splitlines() or ["no reason given"]
        kind = "" if isinstance(error, EdgelmError) else f"{type(error).__name__}: "
        return {"error": kind + lines[0]}
    return {**found, "seconds": round(time.monotonic() - began, 2)}


def _partial(problem: Problem, configuration: Configuration) -> dict[str, Any]:
    from edgelm.evaluate.reference import from_loaded

    judge = judges_of(problem)[0].part(_ROWS)
    with tempfile.TemporaryDirectory(dir=problem.work, prefix=".partial.") as work:
        few = max(round(problem.texts * _SHARE), 1)
        loaded = made(problem, configuration, Path(work) / "model", few)
        return {"quality": judge(from_loaded(loaded))}


def _full(problem: Problem, configuration: Configuration) -> dict[str, Any]:
    from tokenizers import Tokenizer

    from edgelm.export.exporter import make_manifest
    from edgelm.export.precision import write_graph
    from edgelm.runtimes import wrap
    from edgelm.runtimes.engine import Engine
    from edgelm.tuning.costs import open_graph

    judge = judges_of(problem)[0]
    target = load_target(problem.target)
    loaded, source = float_graph(problem, configuration)
    with tempfile.TemporaryDirectory(dir=problem.work, prefix=".graph.") as work:
        written = write_graph(
            loaded,
            target,
            configuration.precision,
            source,
            Path(work),
            ranges_of(problem),
            table_bits=configuration.table_bits,
            keep=kept(problem, configuration),
        )
        size = sum(file.stat().st_size for file in Path(work).iterdir())
        session = open_graph(target, Path(work) / GRAPH, threads=1)
        manifest = make_manifest(loaded, written.graph)
        tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
        model = wrap(Engine(configuration.name, manifest, tokenizer, session))
        return {"quality": judge(model), "graph_bytes": size}


def float_graph(
    problem: Problem, configuration: Configuration
) -> tuple[LoadedModel, Path]:
    """A configuration's model and its float32 graph, made if they are not there yet."""
    from edgelm.export.graph import export_graph

    folder = recipe_folder(problem, configuration)
    loaded = made(problem, configuration, folder / "model", problem.texts)
    graph = folder / "graph" / GRAPH
    if not graph.exists():
        with tempfile.TemporaryDirectory(dir=problem.work, prefix=".float.") as work:
            whole = Path(work) / "graph"
            whole.mkdir()
            export_graph(loaded, whole / GRAPH, load_target(problem.target).opset)
            folder.mkdir(parents=True, exist_ok=True)
            _place(whole, graph.parent)
    return loaded, graph


def made(
    problem: Problem, configuration: Configuration, folder: Path, texts: int
) -> LoadedModel:
    """A configuration's model: loaded from its folder, made there first, or the dense one."""
    from edgelm.pipeline import compress_model

    if not configuration.steps:
        return load_model(problem.model, problem.task)
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=problem.work, prefix=".recipe.") as work:
            whole, recipe = (
                Path(work) / "model",
                recipe_of(problem, configuration, texts),
            )
            compress_model(problem.model, recipe, whole, task=problem.task)
            folder.parent.mkdir(parents=True, exist_ok=True)
            _place(whole, folder)
    return load_model(str(folder), problem.task)


def kept(problem: Problem, configuration: Configuration) -> frozenset[str]:
    """Names of the products that stay in float."""
    groups = problem.groups[: configuration.floats]
    return frozenset(name for group in groups for name in group)


def ranges_of(problem: Problem) -> Calibration:
    """The text that int8's ranges are taken from."""
    texts = str(Path(problem.work) / "calibration.jsonl")
    return Calibration(texts, problem.texts, MAX_TOKENS, seed=problem.seed)


def recipe_folder(problem: Problem, configuration: Configuration) -> Path:
    """Where a recipe's checkpoint and graph are."""
    text = json.dumps(configuration.steps, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return Path(problem.work) / "recipes" / digest


@cache
def judges_of(problem: Problem) -> tuple[Judge, Judge]:
    """What to tune by and what to confirm by; once a process."""
    from edgelm.evaluate.reference import open_reference

    judging = Path(problem.work) / "judging.jsonl"
    if not judging.is_file():
        raise InputError(
            f"{judging} is not to be seen on this worker. "
            "The output, the model and the data have to be on storage that all workers share."
        )
    dense = open_reference(problem.model, problem.task, threads=1)
    return judges(dense, list(read_texts(judging)), problem.data)


def _place(made: Path, folder: Path) -> None:
    """Rename a finished folder to its place, unless another worker was sooner."""
    try:
        os.rename(made, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return False


def plain_job(configuration: Configuration, fidelity: Fidelity) -> Mapping[str, Any]:
    """How a journal names an evaluation. Partial ones are of a recipe, whatever its export."""
    from edgelm import schema

    if fidelity == "partial":
        return {"fidelity": fidelity, "steps": configuration.steps}
    return {"fidelity": fidelity, "configuration": schema.plain(configuration)}
