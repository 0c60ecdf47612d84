"""Builds a bundle's engine on this device: in a child process, with retries, verified before it is kept."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgelm import schema
from edgelm.bundle import MANIFEST, Bundle, file_digest
from edgelm.errors import GateError, SessionError, require
from edgelm.runtimes.session import Session
from edgelm.runtimes.tensorrt.cache import (
    FORMAT_VERSION,
    Found,
    Key,
    Record,
    engines_folder,
    find,
    keep,
)
from edgelm.runtimes.tensorrt.child import Request
from edgelm.runtimes.tensorrt.gpu import GpuInfo, gpu_info
from edgelm.runtimes.tensorrt.ladder import Attempt, attempts
from edgelm.runtimes.tensorrt.log import Sparsity, ran_out_of_memory, read_sparsity
from edgelm.runtimes.tensorrt.plan import BuildPlan, read_plan
from edgelm.runtimes.tensorrt.session import TensorRtSession
from edgelm.targets.board import OLDEST_TENSORRT, ROOT, memory_mib, version_numbers

Progress = Callable[[str], None]
# A build is ended when less than this is left to the system, MiB: a board that swaps
# itself to death answers no more.
FLOOR_MIB = 200
_WATCH_SECONDS = 0.2
# A sparse plan must be faster by this much to be worth its name.
_GAIN = 0.97


@dataclass(frozen=True)
class Outcome:
    """What one child did.

    Attributes:
        answer: What it answered; None if it ended without.
        log: What TensorRT logged.
        starved: Whether it ended for want of memory.
    """

    answer: dict[str, Any] | None
    log: str
    starved: bool


def _say_nothing(what: str) -> None:
    """Nobody asked."""


def make_key(bundle: Bundle, plan: BuildPlan, gpu: GpuInfo) -> Key:
    """What the engine of a bundle depends on here.

    Raises:
        SessionError: The TensorRT here is too old, or the GPU is not what the bundle is for.
        MissingExtraError: TensorRT is not installed.
    """
    version = str(require("tensorrt", "tensorrt").__version__)
    if version_numbers(version) < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        raise SessionError(
            f"TensorRT {version} is too old; edgelm needs {oldest} or newer (JetPack 6.1)."
        )
    due = version_numbers(plan.compute_capability)
    if version_numbers(gpu.compute_capability) < due:
        raise SessionError(
            f"{gpu.name} has compute capability {gpu.compute_capability}; the bundle {bundle.name} is for "
            f"{plan.compute_capability} or newer. Export it for this device."
        )
    digests = [
        bundle.manifest.files[name].sha256
        for name in sorted(bundle.manifest.files)
        if name.startswith(plan.graph)
    ]
    flags = {
        "sparse_2_4": plan.sparse_2_4,
        "workspace_mib": plan.workspace_mib,
        "optimization_level": plan.optimization_level,
    }
    return Key(
        "+".join(digests),
        version,
        gpu.compute_capability,
        gpu.name,
        gpu.cuda,
        plan.profiles,
        flags,
    )


def look_up(bundle: Bundle) -> tuple[Found, Key, BuildPlan]:
    """What the cache has for a bundle on this device. Errors are those of `make_key`."""
    plan = read_plan(bundle)
    key = make_key(bundle, plan, gpu_info())
    return find(key, _name(bundle)), key, plan


def open_session(
    bundle: Bundle, workers: int = 1, *, build: bool | Progress = False
) -> Session:
    """Open the engine that was built here for a bundle.

    Args:
        bundle: The bundle.
        workers: Inferences that may run at once.
        build: Build it first where there is none; a function is told what is being done.

    Raises:
        SessionError: None was, or it is of another device or version; the sentence says why.
            Or it cannot be built.
        GateError: It was built and does not agree with the golden examples.
        MissingExtraError: TensorRT is not installed.
    """
    found, _, plan = look_up(bundle)
    if found.plan is None and build:
        build_engine(bundle, progress=build if callable(build) else _say_nothing)
        found, _, plan = look_up(bundle)
    if found.plan is None:
        raise SessionError(
            f"{found.why} Build it here with: edgelm build {bundle.name}"
        )
    return TensorRtSession(found.plan, plan, workers)


def build_engine(
    bundle: Bundle,
    *,
    force: bool = False,
    root: Path = ROOT,
    progress: Progress = _say_nothing,
) -> Record:
    """Build, verify and keep a bundle's engine, unless it is kept already.

    Args:
        bundle: The bundle.
        force: Build again what is kept already.
        root: Where the machine's file system begins.
        progress: Called with what is being done.

    Returns:
        What is known of the engine.

    Raises:
        SessionError: It cannot be built, or is not what the bundle says.
        GateError: It does not agree with the golden examples.
        MissingExtraError: TensorRT or polygraphy is not installed.
    """
    found, key, plan = look_up(bundle)
    if found.record is not None and not force:
        return found.record
    if found.why:
        progress(found.why)
    require("polygraphy", "tensorrt")
    with tempfile.TemporaryDirectory() as work:
        made = [_build(bundle, plan, False, Path(work), root, progress)]
        if plan.sparse_2_4:
            made.append(_build(bundle, plan, True, Path(work), root, progress))
        times = {name: answer["median_ms"] for name, answer, _ in made}
        name, answer, sparsity = made[0]
        if len(made) > 1 and times["sparse"] <= _GAIN * times["dense"]:
            name, answer, _ = made[1]
        if len(made) > 1:
            sparsity = made[1][2]
        path = Path(work) / f"{name}.plan"
        record = Record(
            FORMAT_VERSION,
            key,
            file_digest(path),
            float(answer["snr_db"]),
            answer["layer_types"],
            sparsity.eligible,
            sparsity.picked if name == "sparse" else (),
            times,
            float(answer["seconds"]),
        )
        keep(path, record, _name(bundle))
    return record


def _name(bundle: Bundle) -> str:
    return file_digest(bundle.path / MANIFEST)


def _build(
    bundle: Bundle,
    plan: BuildPlan,
    sparse: bool,
    work: Path,
    root: Path,
    progress: Progress,
) -> tuple[str, dict[str, Any], Sparsity]:
    """Try until the engine is there: its name, the child's answer, what was sparse."""
    name = "sparse" if sparse else "dense"
    engines = engines_folder()
    engines.mkdir(parents=True, exist_ok=True)
    free = memory_mib(root, "MemAvailable")
    tried = None
    for tried in attempts(plan.workspace_mib, plan.optimization_level, free):
        progress(
            f"building the {name} engine: workspace {tried.workspace_mib} MiB, level {tried.optimization_level}"
        )
        request = make_request(bundle, name, sparse, tried, work, engines)
        outcome = run_child(request, work, root)
        if outcome.answer is None and outcome.starved:
            continue
        return name, accept(outcome), read_sparsity(outcome.log)
    raise SessionError(
        f"The engine of {bundle.name} cannot be built here: memory ran out even with {tried}. "
        "Close other programs and the desktop, or add swap on the NVMe disk."
    )


def make_request(
    bundle: Bundle,
    name: str,
    sparse: bool,
    attempt: Attempt,
    work: Path,
    engines: Path,
) -> Request:
    """The child's task."""
    return Request(
        str(bundle.path),
        str(work / f"{name}.plan"),
        str(work / f"{name}.json"),
        str(engines / "timing.cache"),
        attempt.workspace_mib,
        attempt.optimization_level,
        sparse,
    )


def accept(outcome: Outcome) -> dict[str, Any]:
    """The answer of a child that was not starved.

    Raises:
        SessionError: It refused, or ended without an answer.
        GateError: The engine does not agree with the golden examples.
    """
    answer = outcome.answer
    if answer is None:
        lines = [line for line in outcome.log.strip().split("\n") if line]
        raise SessionError(
            f"The process that builds the engine ended: {lines[-1] if lines else 'no word'}."
        )
    if "error" in answer:
        raise (GateError if answer["gate"] else SessionError)(answer["error"])
    return answer


def run_child(request: Request, work: Path, root: Path) -> Outcome:
    """Run a child to its end, or until the system runs out of memory.

    A limit of the address space would not do: CUDA reserves far more than it uses.
    What is left to the whole system is watched instead, since the GPU of a board has
    no memory of its own.
    """
    task = work / "request.json"
    task.write_text(json.dumps(schema.plain(request)), encoding="utf-8")
    command = [sys.executable, "-m", "edgelm.runtimes.tensorrt.child", str(task)]
    starved = False
    with (work / "log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log)
        _offer_to_the_kernel(child.pid)
        while True:
            try:
                child.wait(_WATCH_SECONDS)
                break
            except subprocess.TimeoutExpired:
                free = memory_mib(root, "MemAvailable")
                if 0 < free < FLOOR_MIB:
                    starved = True
                    child.kill()
            except BaseException:
                child.kill()
                child.wait()
                raise
        log.seek(0)
        text = log.read()
    path = Path(request.answer)
    answer = None
    if path.is_file():
        answer = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
        if "error" in answer and not answer["gate"] and ran_out_of_memory(text):
            return Outcome(None, text, True)
    # SIGKILL: the kernel's own remedy.
    starved = starved or child.returncode == -9 or ran_out_of_memory(text)
    return Outcome(answer, text, answer is None and starved)


def _offer_to_the_kernel(pid: int) -> None:
    """If memory runs out, this process goes first."""
    try:
        (ROOT / "proc" / str(pid) / "oom_score_adj").write_text("1000")
    except OSError:
        return
