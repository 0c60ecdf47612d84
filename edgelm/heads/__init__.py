"""Heads on a frozen encoder: what `edgelm fit-head` does, from a bundle and labelled examples to a new bundle.

No torch: a device can do it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

import edgelm
from edgelm.atomic import new_folder
from edgelm.bundle import HEAD, MANIFEST, SBOM, TOKENS, open_bundle, seal
from edgelm.errors import InputError
from edgelm.heads.examples import HeadProblem, make_problems
from edgelm.heads.fitting import FittedHead, HeadConfig, Kind, fit_head, mean_loss
from edgelm.manifest import (
    EmbeddingInfo,
    HeadInfo,
    Manifest,
    NamedHead,
    NerInfo,
    ScoringInfo,
)
from edgelm.provenance import RUNS, done, extend, of_bundle
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import Engine, open_engine
from edgelm.runtimes.heads import Head, save_head
from edgelm.sbom import write_sbom

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# What an answer says beside the heads.
_TAKEN = ("text", "truncated", "embedding")


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
    bundle: Path, examples: Sequence[Mapping[str, Any]], output: Path, **options: Any
) -> FitReport:
    """`fit_heads` where the examples have labels of one kind: one head."""
    return next(iter(fit_heads(bundle, examples, output, **options).values()))


def fit_heads(
    bundle: Path,
    examples: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    name: str | None = None,
    kind: str = "auto",
    compare: bool = False,
    group: str | None = None,
    folds: int = 5,
    seed: int = 0,
    force: bool = False,
    provider: str | None = None,
    threads: int | None = None,
) -> dict[str, FitReport]:
    """Fit heads to a bundle's encoder and write a bundle that has them.

    A bundle of an embedding model and one head make a bundle for the head's task. Where a name is
    given, the examples have labels of texts and of tokens, or the bundle has a head
    already, the new one has every head under its name (`edgelm.runtimes.analysis.Analyzer`).

    Args:
        bundle: A bundle whose graph gives vectors of texts or of tokens; it is not changed.
        examples: As `edgelm.heads.examples.make_problems` takes them.
        output: The bundle to make. Golden examples stay those of the graph.
        name: Of the new head; where there are two, of the one of texts.
        kind: ``ridge``, ``linear``, ``logistic``, or ``auto``.
        compare: Pairs are comparisons.
        group: Field whose values folds must not split.
        folds: Parts of the data that are left out in turn.
        seed: Of the folds.
        force: Replace a bundle that is there already.
        provider: As for `edgelm.load`.
        threads: As for `edgelm.load`.

    Returns:
        How each new head was chosen, by its name.

    Raises:
        InputError: The bundle's graph gives no vectors, or the examples, the kind or the
            name cannot be used.
        OutputExistsError: ``output`` exists and may not be replaced.
    """
    opened = open_bundle(bundle)
    engine = encoder(open_engine(opened, threads=threads, provider=provider))
    had = named_heads(opened.manifest, opened.name)
    problems = make_problems(Embedder(engine), examples, compare=compare, group=group)
    if had and name is None:
        raise InputError(
            f"{opened.name} has the heads {', '.join(had)} already. Name the new one, for example --name definition."
        )
    several = name is not None or len(problems) > 1
    if name is not None:
        (*others, last) = problems
        if name in others:
            raise InputError(
                f"The examples make a head called {name} themselves; the one of texts needs another --name."
            )
        problems[name] = problems.pop(last)
    if several:
        check_names(problems, had)
    reports, weights = {}, {}
    for key, problem in problems.items():
        reports[key], weights[key] = fit_problem(problem, kind, folds, seed)
    digest = hashlib.sha256(json.dumps(list(examples), sort_keys=True).encode())
    about = {
        key: {
            **asdict(report),
            "losses": {f"{p:g}": loss for p, loss in report.losses.items()},
            "group": group,
            "data_digest": digest.hexdigest(),
        }
        for key, report in reports.items()
    }
    told = ("kind", "rows", "features", "penalty", "data_digest")
    steps = [
        done(
            "fit-head",
            RUNS,
            head={"seed": seed, **{field: row[field] for field in told}},
        )
        for row in about.values()
    ]
    past = {
        **opened.manifest.provenance,
        "lineage": extend(of_bundle(opened.manifest), *steps),
    }
    manifest = replace(
        opened.manifest, created_by=f"edgelm {edgelm.__version__}", codes=None
    )
    if several:
        files = {key: f"head-{key}.safetensors" for key in problems}
        new = {key: _named(problems[key], key, files[key]) for key in problems}
        manifest = replace(
            manifest,
            task="multi",
            embedding=engine.manifest.embedding,
            ner=None,
            scoring=None,
            head=None,
            heads={**had, **new},
            provenance={**past, "heads": {**past.get("heads", {}), **about}},
        )
    else:
        ((key, problem),) = problems.items()
        files, info = {key: HEAD}, problem.info
        manifest = replace(
            manifest,
            task="ner" if isinstance(info, NerInfo) else "scoring",
            ner=info if isinstance(info, NerInfo) else None,
            scoring=info if isinstance(info, ScoringInfo) else None,
            head=HeadInfo(HEAD, problem.features),
            provenance={**past, "head": about[key]},
        )
    codes = opened.manifest.codes
    with new_folder(output, marker=MANIFEST, force=force) as folder:
        for file in opened.manifest.files:
            if file != SBOM and (codes is None or file != codes.file):
                shutil.copyfile(opened.file(file), folder / file)
        for key, head in weights.items():
            save_head(head, folder / files[key])
        write_sbom(folder, manifest)
        seal(folder, manifest)
    return reports


def encoder(engine: Engine) -> Engine:
    """A bundle's engine as that of an embedding model, whatever heads it has.

    Where the graph gives vectors of tokens only, their mean is a text's.

    Raises:
        InputError: It gives neither.
    """
    shapes = {tensor.name: tensor.shape for tensor in engine.manifest.graph.outputs}
    info = engine.manifest.embedding
    if info is None and TOKENS not in shapes:
        raise InputError(
            f"{engine.name} is for {engine.manifest.task}, and its graph gives no vectors that a head could read. "
            "Export an embedding model, or an ner model with --token-embeddings last."
        )
    if info is None:
        info = EmbeddingInfo(int(shapes[TOKENS][-1]), "mean", False)
    own = copy.copy(engine)
    own.manifest = replace(engine.manifest, embedding=info)
    return own


def named_heads(manifest: Manifest, bundle: str) -> dict[str, NamedHead]:
    """The heads of a bundle by name; a single one is called by what it gives.

    Raises:
        InputError: It scores pairs, which no other head can read.
    """
    if manifest.heads:
        return dict(manifest.heads)
    if manifest.ner is not None:
        return {"entities": NamedHead("ner", manifest.head, manifest.ner)}
    if manifest.scoring is None:
        return {}
    if manifest.scoring.inputs == "pair":
        raise InputError(
            f"{bundle} scores pairs of texts; heads beside each other read single texts."
        )
    return {"score": NamedHead("scoring", manifest.head, None, manifest.scoring)}


def check_names(new: Mapping[str, HeadProblem], had: Mapping[str, NamedHead]) -> None:
    """Raise `InputError` unless new heads can stand beside those there are, under their names."""
    for name, problem in new.items():
        if not _NAME.fullmatch(name) or name in _TAKEN:
            raise InputError(
                f"A head cannot be called {name!r}. Use letters, digits, - and _, "
                f"and none of {', '.join(_TAKEN)}."
            )
        if name in had:
            raise InputError(
                f"There is a head called {name} already. Choose another --name."
            )
        if problem.features not in ("text", "token"):
            raise InputError(
                f"The head {name} would read pairs; heads beside each other read single texts. Leave --name away."
            )


def _named(problem: HeadProblem, name: str, file: str) -> NamedHead:
    info, head = problem.info, HeadInfo(file, problem.features)
    if isinstance(info, NerInfo):
        return NamedHead("ner", head, info)
    if len(info.labels) == 1:
        info = replace(info, labels=(name,))
    return NamedHead("scoring", head, None, info)


def fit_problem(
    problem: HeadProblem, kind: str, folds: int, seed: int
) -> tuple[FitReport, Head]:
    """Fit a head to encoded examples.

    Raises:
        InputError: The kind does not suit the labels, or there are fewer rows than folds.
    """
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
    weight, bias = fitted.weight.astype(np.float32), fitted.bias.astype(np.float32)
    return report, Head(problem.features, weight, bias)


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
