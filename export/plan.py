"""What a device needs to build its own engine: profiles and limits, in the bundle's ``build.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from edgelm import schema
from edgelm.bundle import BUILD
from edgelm.errors import ExportError
from edgelm.export.fitting import is_sparse
from edgelm.manifest import Graph
from edgelm.models import LoadedModel
from edgelm.runtimes.tensorrt.plan import BuildPlan, Profile
from edgelm.targets import Target, target_text


def write_plan(
    loaded: LoadedModel, target: Target, graph: Graph, precision: str, folder: Path
) -> None:
    """Write ``build.json`` and the facts about the target beside a graph.

    Raises:
        ExportError: The target does not say how its engine is built.
    """
    engine = target.engine
    if engine is None or len(engine.batch) != 3 or target.gpu is None:
        raise ExportError(
            f"The target {target.name} does not say how to build its engine."
        )
    plan = BuildPlan(
        format_version=1,
        graph=graph.file,
        inputs=tuple(tensor.name for tensor in graph.inputs),
        precision=precision,
        strongly_typed=True,
        profiles=profiles(loaded.max_length, engine.sequence, engine.batch),
        workspace_mib=engine.workspace_mib,
        optimization_level=engine.optimization_level,
        tensorrt=engine.tensorrt,
        compute_capability=target.gpu.compute_capability,
        sparse_2_4=is_sparse(loaded) and target.gpu.sparse_2_4,
    )
    text = json.dumps(schema.plain(plan), indent=2)
    (folder / BUILD).write_text(text + "\n", encoding="utf-8")
    (folder / "target.toml").write_text(target_text(target.name), encoding="utf-8")


def profiles(
    longest: int, sequence: Sequence[int], batch: Sequence[int]
) -> tuple[Profile, ...]:
    """Optimisation profiles: one a bucket of lengths, the last ends with the longest input.

    Args:
        longest: Longest input that the model takes, tokens.
        sequence: Upper ends of the buckets, ascending.
        batch: Smallest, usual and largest batch.
    """
    ends = [*(end for end in sequence if end < longest), longest]
    starts = [1, *(end + 1 for end in ends[:-1])]
    small, usual, large = batch
    return tuple(
        Profile((small, start), (usual, end), (large, end))
        for start, end in zip(starts, ends, strict=True)
    )
