"""From a model to the best bundle within limits, and a report that proves it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import edgelm
from edgelm import recipe as recipes
from edgelm import schema
from edgelm.atomic import check_free, new_folder
from edgelm.errors import (
    EdgelmError,
    GateError,
    InputError,
    ModelError,
    TargetError,
)
from edgelm.evaluate.latency import environment
from edgelm.models import load_model
from edgelm.reports.tuning import tuning_page
from edgelm.runtimes.sensors import device_state
from edgelm.targets import load_target
from edgelm.targets.board import ROOT
from edgelm.tasks import Task
from edgelm.tuning.costs import runs_here
from edgelm.tuning.finalists import asked_for, build_finalists, choose, verdict
from edgelm.tuning.journal import Journal
from edgelm.tuning.running import Job, Run, processes
from edgelm.tuning.search import Found, Limits, drop, search
from edgelm.tuning.setup import (
    Baseline,
    identity,
    measure_baseline,
    read_baseline,
    write_texts,
)
from edgelm.tuning.space import (
    SPACES,
    Configuration,
    Values,
    every,
    presets,
    space_for,
)
from edgelm.tuning.trial import (
    Problem,
    plain_job,
    recipe_folder,
    recipe_of,
)

RESULT, PAGE, JOURNAL = "tune.json", "report.html", "journal.jsonl"
# Share of the time that is left for building, confirming and measuring the finalists.
_RESERVE = 0.25
# Large enough for tables of 4 bits (`edgelm.export`).
_TABLE_ROWS = 4096

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        model: A built-in name, a folder or a hub id.
        target: Name of a target.
        limits: What the result has to keep to.
        task: The model's task; inferred if None.
        data: A file of labelled data; None to judge without labels.
        texts: To calibrate on, and to judge by without labels: ``built-in`` or a file.
        max_texts: Of these, to calibrate on.
        trials: Candidates to consider.
        minutes: After how many to come to an end; None for no limit.
        seed: Of everything random.
    """

    model: str
    target: str
    limits: Limits
    task: Task | None = None
    data: str | None = None
    texts: str = "built-in"
    max_texts: int = 512
    trials: int = 48
    minutes: float | None = None
    seed: int = 0


def tune(
    request: Request,
    output: Path,
    runner: Callable[[], AbstractContextManager[Run]] = lambda: processes(2),
    *,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Find the best bundle within limits.

    Args:
        request: What is asked for.
        output: Folder to make: the bundle, its recipe, ``tune.json``, ``report.html``, ``journal.jsonl``.
            What a run is at lies beside it until then; the same call goes on with it.
        runner: Opens what runs evaluations.
        force: Replace a result, or an unfinished run of other settings.
        progress: Called with what is being done, how much of it is done, and of how much.

    Returns:
        What ``tune.json`` holds.

    Raises:
        GateError: Nothing keeps to the limits; ``output`` then holds the report without a bundle.
        EdgelmError: The model, the data or the target cannot be used, or the disk is full.
    """
    began = time.monotonic()
    check_free(output, marker=RESULT, force=force)
    target = load_target(request.target)
    loaded = load_model(request.model, request.task)
    if loaded.routing is not None:
        raise ModelError(
            f"{request.model} has routed experts, which tuning would lose. Tune the model that it was made of."
        )
    if target.runtime not in SPACES or loaded.info is None:
        raise TargetError(
            f"{target.name} cannot be tuned for: there are no bundles for it of models for the task {loaded.task}."
        )
    if request.limits.p95_ms is not None and not runs_here(target):
        raise TargetError(
            f"{target.name} is not this machine, so that no latency can be measured for it. "
            "Leave --max-p95-ms out, or tune on the device."
        )
    work = output.absolute().parent / f".{output.name}.tuning"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"Cannot write to {output.parent}: {error.strerror}."
        ) from error
    settings = _settings(request, identity(loaded))
    try:
        journal = Journal(work / JOURNAL, settings)
    except InputError:
        if not force:
            raise
        shutil.rmtree(work)
        work.mkdir()
        journal = Journal(work / JOURNAL, settings)
    data = None if request.data is None else str(Path(request.data).absolute())
    model = (
        str(Path(request.model).absolute())
        if Path(request.model).is_dir()
        else request.model
    )
    problem = Problem(
        model,
        request.task,
        target.name,
        str(work),
        data,
        request.seed,
        request.max_texts,
    )
    large = any(
        p.ndim == 2 and len(p) >= _TABLE_ROWS
        for name, p in loaded.model.named_parameters()
        if "embed" in name
    )
    space = space_for(target, loaded.architecture, table_bits=large)
    clock = _Clock(journal, began, request.minutes)
    try:
        with runner() as run:
            texts = write_texts(request.texts, request.seed, work)
            known = journal.get({"what": "baseline"})
            if known is None:
                progress("measuring the dense model", 0, request.trials)
                made = measure_baseline(problem, space, loaded, target, texts)
                known = schema.plain(made)
                journal.put({"what": "baseline"}, known)
            baseline = read_baseline(known)
            _check_reach(request.limits, space, baseline)
            problem = replace(problem, groups=baseline.groups)
            found = _search(
                request, problem, space, baseline, journal, clock, run, progress
            )
    except EdgelmError:
        if (
            len(journal) == 1
        ):  # nothing to go on with but the settings, which were wrong
            shutil.rmtree(work, ignore_errors=True)
        raise
    progress("building the finalists", len(found.rows), request.trials)
    finalists = build_finalists(
        problem, request.limits, baseline, found, presets(space), journal, texts
    )
    best = choose(finalists, request.limits)
    result = _result(request, baseline, found, finalists, best)
    with new_folder(output, marker=RESULT, force=force) as folder:
        if best is not None:
            shutil.copytree(best["bundle"], folder / "bundle")
            shutil.copy(work / "calibration.jsonl", folder)
            recipe = _recipe(problem, best["configuration"], output)
            if recipe:
                (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
        shutil.copy(work / JOURNAL, folder)
        text = json.dumps(result, indent=1) + "\n"
        (folder / RESULT).write_text(text, encoding="utf-8")
        (folder / PAGE).write_text(tuning_page(result), encoding="utf-8")
    shutil.rmtree(work)
    if best is None:
        raise GateError(f"{result['verdict']} The report: {output / PAGE}")
    return result


def _settings(request: Request, weights: str) -> dict[str, Any]:
    """All that results depend on; limits, trials and minutes only say which of them are asked for."""
    import torch

    about = dict(schema.plain(request))
    for name in ("limits", "trials", "minutes"):
        about.pop(name, None)
    for name in ("data", "texts"):
        path = Path(str(about.get(name)))
        if path.is_file():
            about[name] = [str(path), hashlib.sha256(path.read_bytes()).hexdigest()]
    versions = {"edgelm": edgelm.__version__, "torch": torch.__version__}
    return {**about, "weights": weights, "versions": versions}


def _check_reach(
    limits: Limits, space: Mapping[str, Values], baseline: Baseline
) -> None:
    """Refuse limits that nothing comes near, before any work."""
    costs = [baseline.costs.predict(c) for c in every(space)]
    if not any(map(limits.within_reach, costs)):
        least, fastest = min(c.size_mb for c in costs), min(c.p95 for c in costs)
        p95 = f" and the fastest a p95 of {fastest:.2f} ms" if limits.p95_ms else ""
        raise GateError(
            f"Nothing comes near {asked_for(limits)}: the smallest is predicted to take {least:.1f} MB{p95}."
        )


class _Clock:
    """Time spent, over all the calls that a run took: what is replayed took as long as the journal says."""

    def __init__(self, journal: Journal, began: float, minutes: float | None) -> None:
        self._journal, self._minutes = journal, minutes
        self._times: list[float] = []
        while (known := journal.get(_clock_key(len(self._times)))) is not None:
            self._times.append(known)
        self._began = began - (self._times[-1] if self._times else 0.0)

    def go_on(self, generation: int) -> bool:
        """Whether there is time for one more generation, as long as the longest so far."""
        if generation == len(self._times):
            self._times.append(time.monotonic() - self._began)
            self._journal.put(_clock_key(generation), self._times[-1])
        if self._minutes is None or generation == 0:
            return True
        now, before = self._times[generation], self._times[:generation]
        longest = max(b - a for a, b in pairwise([*before, now]))
        return now + longest <= self._minutes * 60 * (1 - _RESERVE)


def _clock_key(generation: int) -> dict[str, Any]:
    return {"what": "clock", "generation": generation}


def _search(
    request: Request,
    problem: Problem,
    space: Mapping[str, Values],
    baseline: Baseline,
    journal: Journal,
    clock: _Clock,
    run: Run,
    progress: Progress,
) -> Found:
    """The search, with every evaluation in the journal and old checkpoints removed."""

    def evaluate(jobs: Sequence[Job]) -> list[Mapping[str, Any]]:
        keys = [plain_job(*job) for job in jobs]
        missing = {
            json.dumps(key): (key, job)
            for key, job in zip(keys, jobs, strict=True)
            if journal.get(key) is None
        }
        todo = list(missing.values())
        for i, result in run(problem, [job for _, job in todo]):
            if "graph_bytes" in result:
                size = (result["graph_bytes"] + baseline.extra_bytes) / 1e6
                result = {**result, "size_mb": size}
            journal.put(todo[i][0], result)
        return [journal.get(key) for key in keys]

    def after(found: Found) -> None:
        whole, good = len(found.whole), len(found.front)
        what = f"{whole} of {len(found.rows)} evaluated in full, {good} on the front"
        progress(what, len(found.rows), request.trials)
        front = [row.configuration for row in found.front]
        keep = {recipe_folder(problem, c) for c in (*front, *presets(space))}
        recipes_made = Path(problem.work) / "recipes"
        for folder in set(recipes_made.glob("*")) - keep:
            shutil.rmtree(folder, ignore_errors=True)

    clock.go_on(0)
    return search(
        space,
        presets(space),
        baseline.costs.predict,
        evaluate,
        baseline.quality,
        request.limits,
        trials=request.trials,
        seed=request.seed,
        go_on=clock.go_on,
        after=after,
    )


def _result(
    request: Request,
    baseline: Baseline,
    found: Found,
    finalists: Sequence[dict[str, Any]],
    best: dict[str, Any] | None,
) -> dict[str, Any]:
    """What ``tune.json`` holds; plain data."""
    state = device_state(ROOT)
    target = load_target(request.target)
    front = {row.configuration for row in found.front}
    rows = []
    for row in found.rows:
        about = {**schema.plain(row), "name": row.configuration.name}
        if row.quality is not None:
            about["drop"] = drop(baseline.quality, row.quality)
        rows.append({**about, "front": row.configuration in front})
    shown = [
        {k: v for k, v in schema.plain(f).items() if k != "bundle"}
        | {"chosen": f is best}
        for f in finalists
    ]
    learnt = found.predictor
    return {
        "request": schema.plain(request),
        "limits": asked_for(request.limits),
        "target": target.title,
        "measured": runs_here(target),
        "measure": baseline.measure,
        "dense": baseline.quality,
        "dense_confirmed": baseline.confirmed,
        "judged_on": list(baseline.rows),
        "verdict": verdict(request.limits, baseline, found, finalists, best),
        "considered": len(found.rows),
        "whole": len(found.whole),
        "predictor": learnt and {"kind": learnt.kind, "errors": learnt.errors},
        "rows": rows,
        "finalists": shown,
        "environment": environment(state, state),
    }


def _recipe(problem: Problem, configuration: Configuration, output: Path) -> str | None:
    """The recipe of a configuration, to compress with again; None for the dense model."""
    if not configuration.steps:
        return None
    recipe = recipe_of(problem, configuration, problem.texts)
    texts = str(output / "calibration.jsonl")
    calibration = replace(recipe.calibration, texts=texts)
    return recipes.to_toml(replace(recipe, calibration=calibration))
