"""Entities, search, the status page, and `POST /`."""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Body, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

import edgelm
from edgelm.errors import BinaryIndexError
from edgelm.runtimes.analysis import Analyzer, Answer
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.index.binary_index import Hit
from edgelm.runtimes.ner import Entity, EntityRecognizer
from edgelm.runtimes.scoring import Scorer
from edgelm.runtimes.service import tei
from edgelm.runtimes.service.bodies import (
    TEI_ERRORS,
    AnalyzeBody,
    EmbedBody,
    NerBody,
    NerParameters,
    PredictBody,
    SearchBody,
    SimilarityBody,
)
from edgelm.runtimes.service.embedding import check_direction
from edgelm.runtimes.service.models import Search, Served
from edgelm.runtimes.service.replies import Refusal, reply, success
from edgelm.runtimes.service.state import characters, finite
from edgelm.runtimes.service.tei import log_fields, state_of

B = TypeVar("B", bound=BaseModel)

router = APIRouter(responses=TEI_ERRORS, tags=["edgelm"])


@router.post("/ner")
async def ner(body: NerBody, request: Request) -> Response:
    """Entities, as the pipeline of transformers gives them; of a list of texts a list of lists."""
    state = state_of(request)
    served = state.models.pick(body.model, EntityRecognizer)
    recognizer = served.model
    assert isinstance(recognizer, EntityRecognizer)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    log_fields(request, served, inputs=len(texts))
    options = body.parameters or NerParameters()
    strategy = body.aggregation_strategy or options.aggregation_strategy or "first"
    threshold = next(
        (t for t in (body.threshold, options.threshold) if t is not None), 0.0
    )
    wanted = body.labels if body.labels is not None else options.labels
    ignored = set(body.ignore_labels or options.ignore_labels or ())
    found, call = await state.run(
        served,
        recognizer.extract,
        texts,
        inputs=len(texts),
        cut=True,  # nothing is cut: long texts are read in windows
        strategy=strategy,
        thresholds=threshold,
    )
    rows = [
        [
            _entity(entity, strategy)
            for entity in entities
            if entity.label not in ignored
            and (wanted is None or entity.label in wanted)
        ]
        for entities in found
    ]
    single = isinstance(body.inputs, str)
    return success(rows[0] if single else rows, call, characters=characters(texts))


def _entity(entity: Entity, strategy: str) -> dict[str, Any]:
    """As the pipeline of transformers gives it."""
    return {
        "entity" if strategy == "none" else "entity_group": entity.label,
        "score": entity.score,
        "word": entity.text,
        "start": entity.start,
        "end": entity.end,
    }


@router.post("/analyze")
async def analyze(body: AnalyzeBody, request: Request) -> Response:
    """What every head says of a text, from one pass; of a list of texts a list."""
    state = state_of(request)
    served = state.models.pick(body.model, Analyzer)
    check_direction(body)
    analyzer = served.model
    assert isinstance(analyzer, Analyzer)
    unknown = [name for name in body.heads or () if name not in analyzer.heads]
    if unknown:
        raise Refusal(
            f"{served.name} has no head {unknown[0][:100]!r}. Its heads: {', '.join(analyzer.heads)}.",
            param="heads",
        )
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    log_fields(request, served, inputs=len(texts))
    (answers, cut), call = await state.run(
        served,
        analyzer.analyze_with_truncation,
        texts,
        inputs=len(texts),
        cut=body.truncate,
        heads=body.heads,
        strategy=body.aggregation_strategy,
        thresholds=body.threshold,
    )
    strategy = body.aggregation_strategy
    rows = [
        {name: _answer(answer, strategy) for name, answer in by_head.items()}
        for by_head in answers
    ]
    single = isinstance(body.inputs, str)
    return success(
        rows[0] if single else rows,
        call,
        characters=characters(texts),
        truncated=int(cut.sum()),
    )


def _answer(answer: Answer, strategy: str) -> Any:
    if isinstance(answer, list):
        return [_entity(entity, strategy) for entity in answer]
    if isinstance(answer, dict):
        return {label: finite(np.asarray(score)) for label, score in answer.items()}
    return finite(np.asarray(answer))


@router.post("/search")
async def search(body: SearchBody, request: Request) -> Response:
    """The nearest documents of the index; of a list of queries a list of lists."""
    state = state_of(request)
    searched = state.models.search
    if searched is None:
        raise Refusal("No index is served. Start the server with --index PATH.", 404)
    texts = [body.query] if isinstance(body.query, str) else body.query
    log_fields(request, searched.served, inputs=len(texts))
    cut = state.limits.auto_truncate if body.truncate is None else body.truncate
    found, call = await state.run(
        searched.served, _search, searched, texts, body.k, inputs=len(texts), cut=cut
    )
    rows = [
        [{"id": h.id, "score": h.score, "text": h.text} for h in hits] for hits in found
    ]
    single = isinstance(body.query, str)
    return success(rows[0] if single else rows, call, characters=characters(texts))


def _search(searched: Search, texts: list[str], k: int) -> list[list[Hit]]:
    queries = searched.encoder.queries(texts, truncate=True)
    index = searched.index()
    return index.search(
        queries.rows,
        k,
        shortlist=queries.codes,
        vectors=queries.vectors if index.manifest.vectors else None,
    )


@router.post("/", include_in_schema=False)
@router.post("/invocations", include_in_schema=False)
async def main_task(
    data: Annotated[dict[str, Any], Body()], request: Request
) -> Response:
    """The task of the first bundle, by the shape of its inputs, as hosted endpoints do."""
    if isinstance(data.get("inputs"), dict):
        return await tei.similarity(_body(SimilarityBody, data), request)
    name = data.get("model")
    served = state_of(request).models.pick(name if isinstance(name, str) else None)
    if isinstance(served.model, Analyzer):
        return await analyze(_body(AnalyzeBody, data), request)
    if isinstance(served.model, EntityRecognizer):
        return await ner(_body(NerBody, data), request)
    if isinstance(served.model, Scorer):
        return await tei.predict(_body(PredictBody, data), request)
    return await tei.embed_route(_body(EmbedBody, data), request)


def _body(kind: type[B], data: dict[str, Any]) -> B:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_input=False)) from error


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def page() -> Response:
    """The status page."""
    headers = {
        "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'",
        "cache-control": "no-cache",
    }
    return Response(_page(), media_type="text/html; charset=utf-8", headers=headers)


@cache
def _page() -> bytes:
    return (Path(__file__).parent / "status.html").read_bytes()


@router.get("/status")
async def status(request: Request) -> Response:
    """What the status page shows."""
    state = state_of(request)
    searched = state.models.search
    index = None
    if searched is not None:
        with suppress(BinaryIndexError):  # requests that need it are told
            searched.index()
        index = {
            "path": str(searched.latest.path),
            "rows": len(searched.latest),
            "bits": searched.latest.bits,
            "model": searched.served.name,
        }
    return reply(
        {
            "version": edgelm.__version__,
            "uptime_s": round(time.time() - state.started),
            "inputs_under_way": state.inputs,
            "max_queue": state.limits.max_queue,
            "index": index,
            "models": [_about(one) for one in state.models.all],
        }
    )


def _about(served: Served) -> dict[str, Any]:
    manifest, model = served.manifest, served.model
    seconds = list(served.seconds)
    latency = (
        dict(
            zip(
                ("p50", "p95", "p99"), np.percentile(seconds, [50, 95, 99]), strict=True
            )
        )
        if seconds
        else {}
    )
    return {
        "name": served.name,
        "task": manifest.task,
        "model": manifest.model.name,
        "precision": manifest.precision,
        "target": manifest.target,
        "runtime": served.engine.session.runtime,
        "created_by": manifest.created_by,
        "digest": manifest.files[manifest.graph.file].sha256[:12],
        "max_length": manifest.tokenizer.max_length,
        "dimension": model.dimension if isinstance(model, Embedder) else None,
        "labels": list(model.labels)
        if isinstance(model, (EntityRecognizer, Scorer))
        else None,
        "heads": {one.name: one.manifest.task for one in served.heads},
        "pairs": isinstance(model, Scorer) and model.takes_pairs,
        "waiting": len(served.engine.batcher),
        "requests": len(seconds),
        "latency_ms": {name: round(1000 * float(v), 2) for name, v in latency.items()},
    }
