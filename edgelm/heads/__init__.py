"""Heads on a frozen encoder: what `edgelm fit-head` does, from a bundle and labelled examples to a new bundle.

No torch: a device can do it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

import edgelm
from edgelm.atomic import new_folder
from edgelm.bundle import (
    HEAD,
    MANIFEST,
    SBOM,
    HeadInfo,
    NerInfo,
    ScoringInfo,
    open_bundle,
    seal,
)
from edgelm.errors import InputError
from edgelm.heads.examples import HeadProblem, make_problem
from edgelm.heads.fitting import FittedHead, HeadConfig, Kind, fit_head, mean_loss
from edgelm.provenance import RUNS, done, extend, of_bundle
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import open_engine
from edgelm.runtimes.heads import Head, save_head
from edgelm.sbom import write_sbom


@dataclass(frozen=True)
class FitReport:
    """How a head was chosen and how well it does on rows that it was not fitted to.

    Attributes:
        kind: ``ridge``, ``linear`` or ``logistic``.
        features: What the head is applied to.
        rows: Rows it was fitted to.
        penalty: The chosen penalty.
        losses: Each penalty's mean held-out loss.
        measures: ``accuracy``, or ``r2`` and ``correlation``, on held-out rows, 0..1.
        baseline: The same measures of the commonest class, or of the mean.
    """

    kind: str
    features: str
    rows: int
    penalty: float
    losses: dict[float, float]
    measures: dict[str, float]
    baseline: dict[str, float]


def fit(
    bundle: Path,
    examples: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    kind: str = "auto",
    compare: bool = False,
    group: str | None = None,
    folds: int = 5,
    seed: int = 0,
    force: bool = False,
    provider: str | None = None,
    threads: int | None = None,
) -> FitReport:
    """Fit a head to a bundle's encoder and write a bundle that has it.

    Args:
        bundle: A bundle of an embedding model; it is not changed.
        examples: As `edgelm.heads.examples.make_problem` takes them.
        output: The bundle to make. Golden examples stay those of the encoder.
        kind: ``ridge``, ``linear``, ``logistic``, or ``auto``.
        compare: Pairs are comparisons.
        group: Field whose values folds must not split.
        folds: Parts of the data that are left out in turn.
        seed: Of the folds.
        force: Replace a bundle that is there already.
        provider: As for `edgelm.load`.
        threads: As for `edgelm.load`.

    Raises:
        InputError: The bundle is no embedding model's, or the examples or the kind
            cannot be used.
        OutputExistsError: ``output`` exists and may not be replaced.
    """
    opened = open_bundle(bundle)
    engine = open_engine(opened, threads=threads, provider=provider)
    if engine.manifest.task != "embedding":
        raise InputError(
            f"{bundle} is for {engine.manifest.task}; a head is fitted to an embedding model."
        )
    problem = make_problem(Embedder(engine), examples, compare=compare, group=group)
    labelled = problem.loss != "squared"
    if kind == "auto":
        kind = "logistic" if labelled else "ridge"
    if (kind == "logistic") != labelled and not problem.comparison:
        need = "logistic" if labelled else "ridge or linear"
        raise InputError(
            f"These examples have {'labels' if labelled else 'scores'}, which need the kind {need}. Got {kind} instead."
        )
    config = HeadConfig(kind=cast(Kind, kind), folds=folds, seed=seed)
    if problem.comparison and kind != "logistic":
        centred = 2 * problem.targets - 1
        problem = replace(problem, targets=centred, loss="squared")
    fitted = fit_head(
        problem.rows,
        problem.targets,
        config,
        loss=problem.loss,
        groups=problem.groups,
        intercept=not problem.comparison,
    )
    measures, baseline = judge(problem, fitted)
    report = FitReport(
        kind,
        problem.features,
        len(problem.rows),
        fitted.penalty,
        fitted.losses,
        measures,
        baseline,
    )
    about = {
        **asdict(report),
        "losses": {f"{p:g}": loss for p, loss in fitted.losses.items()},
        "group": group,
        "data_digest": hashlib.sha256(
            json.dumps(list(examples), sort_keys=True).encode()
        ).hexdigest(),
    }
    info = problem.info
    told = ("kind", "rows", "features", "penalty", "data_digest")
    fitted_here = done(
        "fit-head", RUNS, head={"seed": seed, **{key: about[key] for key in told}}
    )
    manifest = replace(
        opened.manifest,
        created_by=f"edgelm {edgelm.__version__}",
        task="ner" if isinstance(info, NerInfo) else "scoring",
        ner=info if isinstance(info, NerInfo) else None,
        scoring=info if isinstance(info, ScoringInfo) else None,
        codes=None,
        head=HeadInfo(HEAD, problem.features),
        provenance={
            **opened.manifest.provenance,
            "head": about,
            "lineage": extend(of_bundle(opened.manifest), fitted_here),
        },
    )
    codes = opened.manifest.codes
    with new_folder(output, marker=MANIFEST, force=force) as folder:
        for name in opened.manifest.files:
            if name != SBOM and (codes is None or name != codes.file):
                shutil.copyfile(opened.file(name), folder / name)
        weight = fitted.weight.astype(np.float32)
        head = Head(problem.features, weight, fitted.bias.astype(np.float32))
        save_head(head, folder / HEAD)
        write_sbom(folder, manifest)
        seal(folder, manifest)
    return report


def judge(
    problem: HeadProblem, fitted: FittedHead
) -> tuple[dict[str, float], dict[str, float]]:
    """Measures on held-out rows, and those of the commonest class or the mean."""
    found, due = fitted.held_out, problem.targets
    if problem.comparison:
        sign = np.sign(due[:, 0] - (0.5 if problem.loss == "sigmoid" else 0.0))
        decided = sign != 0
        right = np.mean(np.sign(found[decided, 0]) == sign[decided])
        most = max(np.mean(sign[decided] > 0), np.mean(sign[decided] < 0))
        return {"accuracy": float(right)}, {"accuracy": float(most)}
    if problem.loss == "softmax":
        right = np.mean(found.argmax(axis=1) == due.argmax(axis=1))
        return {"accuracy": float(right)}, {"accuracy": float(due.mean(axis=0).max())}
    if problem.loss == "sigmoid":
        right = np.mean((found > 0) == (due > 0.5))
        most = np.maximum(due.mean(axis=0), 1 - due.mean(axis=0)).mean()
        return {"accuracy": float(right)}, {"accuracy": float(most)}
    spread = mean_loss(np.broadcast_to(due.mean(axis=0), due.shape), due, "squared")
    error = mean_loss(found, due, "squared")
    r2 = 1 - error / spread if spread else 0.0
    varied = found.std() > 0 and due.std() > 0
    r = float(np.corrcoef(found[:, 0], due[:, 0])[0, 1]) if varied else 0.0
    return {"r2": r2, "correlation": r}, {"r2": 0.0, "correlation": 0.0}
