"""Builds, inspects, verifies and times one engine, in a process of its own.

Reads a request from the JSON file that is its only argument, and writes the answer beside the plan. What
TensorRT logs goes to stderr. A build that runs out of memory ends this process and no other.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from edgelm import schema
from edgelm.bundle import open_bundle
from edgelm.errors import EdgelmError, GateError, SessionError, require
from edgelm.golden import load_golden
from edgelm.runtimes.engine import Engine, open_tokenizer
from edgelm.runtimes.tensorrt.inspector import (
    check_precision,
    count_types,
    read_layers,
)
from edgelm.runtimes.tensorrt.plan import BuildPlan, read_plan
from edgelm.runtimes.tensorrt.session import TensorRtSession
from edgelm.runtimes.verification import verify

if TYPE_CHECKING:
    import polygraphy.backend.trt
    import tensorrt

_ROUNDS = 30


@dataclass(frozen=True)
class Request:
    """What to build.

    Attributes:
        bundle: Path of the bundle.
        plan: The file to write.
        answer: The file to write the answer to.
        timing_cache: File of timings to start from and to add to.
        workspace_mib: Memory that tactics may use.
        optimization_level: TensorRT's builder optimisation level.
        sparse: Whether to look for 2:4 sparse kernels.
    """

    bundle: str
    plan: str
    answer: str
    timing_cache: str
    workspace_mib: int
    optimization_level: int
    sparse: bool


def build_plan(plan: BuildPlan, graph: Path, request: Request) -> bytes:
    """Build an engine with polygraphy; TensorRT 10.3 to 11.

    Raises:
        SessionError: TensorRT refuses the graph.
    """
    trt = require("tensorrt", "tensorrt")
    driver = require("polygraphy.backend.trt", "tensorrt")
    log = require("polygraphy.logger", "tensorrt").G_LOGGER
    log.module_severity = log.VERBOSE  # sparsity is told there
    profiles = []
    for shapes in plan.profiles:
        profile: polygraphy.backend.trt.Profile = driver.Profile()
        for name in plan.inputs:
            profile.add(name, min=shapes.min, opt=shapes.opt, max=shapes.max)
        profiles.append(profile)
    config = driver.CreateConfig(
        profiles=profiles,
        load_timing_cache=_existing(request.timing_cache),
        sparse_weights=request.sparse,
        memory_pool_limits={
            trt.MemoryPoolType.WORKSPACE: request.workspace_mib << 20,
        },
        builder_optimization_level=request.optimization_level,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )
    network = driver.NetworkFromOnnxPath(str(graph), strongly_typed=True)
    build = driver.EngineBytesFromNetwork(
        network, config=config, save_timing_cache=request.timing_cache
    )
    try:
        return bytes(build())
    except Exception as error:  # polygraphy's exception is no public base class
        raise SessionError(f"TensorRT cannot build the engine: {error}") from error


def _existing(path: str) -> str | None:
    return path if Path(path).is_file() else None


def inspect(path: Path) -> str:
    """The engine inspector's JSON of a plan."""
    trt = require("tensorrt", "tensorrt")
    logger: tensorrt.Logger = trt.Logger(trt.Logger.WARNING)
    runtime: tensorrt.Runtime = trt.Runtime(logger)
    engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(
        path.read_bytes()
    )
    if engine is None:
        raise SessionError(f"TensorRT refuses the plan {path} that it has just built.")
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def work(request: Request) -> dict[str, Any]:
    """Do what was asked for; the answer is plain data."""
    bundle = open_bundle(request.bundle)
    plan = read_plan(bundle)
    began = time.perf_counter()
    path = Path(request.plan)
    path.write_bytes(build_plan(plan, bundle.file(plan.graph), request))
    seconds = time.perf_counter() - began
    layers = read_layers(inspect(path))
    check_precision(layers, plan.precision)
    session = TensorRtSession(path, plan)
    engine = Engine(bundle.name, bundle.manifest, open_tokenizer(bundle), session)
    examples = load_golden(bundle)
    verified = verify(engine, examples)
    return {
        "seconds": round(seconds, 1),
        "layer_types": count_types(layers),
        "snr_db": round(min(verified.snr_db, 300.0), 2),
        "median_ms": round(
            _median_ms(engine, [e.text for e in examples], [e.pair for e in examples]),
            3,
        ),
    }


def _median_ms(engine: Engine, texts: list[str], pairs: list[str | None]) -> float:
    """Median time of the golden texts as one call, ms."""
    others = [pair or "" for pair in pairs] if any(pairs) else None
    encodings = engine.tokenize(texts, others)
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        engine.run(encodings)
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def main() -> None:
    """Read the request, write the answer: ``{"error": ..., "gate": ...}`` where it is refused."""
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    request = schema.build(Request, json.loads(text), sys.argv[1], SessionError)
    try:
        answer = work(request)
    except EdgelmError as error:
        answer = {"error": str(error), "gate": isinstance(error, GateError)}
    Path(request.answer).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
