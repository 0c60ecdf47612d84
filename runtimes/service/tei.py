"""The routes of text-embeddings-inference."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

import edgelm
from edgelm.bundle import TOKENS
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.scoring import Scorer
from edgelm.runtimes.service.bodies import (
    TEI_ERRORS,
    DecodeBody,
    EmbedAllBody,
    EmbedBody,
    PredictBody,
    RerankBody,
    SimilarityBody,
    SimilarityParameters,
    TokenizeBody,
)
from edgelm.runtimes.service.embedding import as_texts, check_direction, decode, embed
from edgelm.runtimes.service.models import Served, model_type
from edgelm.runtimes.service.replies import Refusal, reply, success
from edgelm.runtimes.service.state import State, characters, finite

router = APIRouter(responses=TEI_ERRORS, tags=["text-embeddings-inference"])


def state_of(request: Request) -> State:
    """The server's state."""
    state: State = request.app.state.edgelm
    return state


def log_fields(request: Request, served: Served, **fields: Any) -> None:
    """Have the log line of a request say more."""
    request.scope["edgelm"] = {"model": served.name, **fields}


@router.post("/embed")
async def embed_route(body: EmbedBody, request: Request) -> Response:
    """Vectors: always a list of lists."""
    state = state_of(request)
    served = state.models.pick(body.model, Embedder)
    check_direction(body)
    texts = as_texts(served, body.inputs)
    log_fields(request, served, inputs=len(texts))
    vectors, cut, call = await embed(
        state,
        served,
        texts,
        cut=body.truncate,
        prompt=body.prompt_name,
        normalize=body.normalize,
        dimensions=body.dimensions,
    )
    return success(vectors.tolist(), call, characters=characters(texts), truncated=cut)


@router.post("/embed_all")
async def embed_all(body: EmbedAllBody, request: Request) -> Response:
    """Token vectors, of bundles that have them."""
    state = state_of(request)
    served = state.models.pick(body.model, Embedder)
    model = served.model
    assert isinstance(model, Embedder)
    if all(t.name != TOKENS for t in served.manifest.graph.outputs):
        raise Refusal(
            f"The graph of {served.name} gives pooled vectors only, no {TOKENS}. "
            "Use /embed, or export the model with --token-embeddings last.",
            424,
        )
    check_direction(body)
    texts = as_texts(served, body.inputs)
    log_fields(request, served, inputs=len(texts))
    found, call = await state.run(
        served,
        model.encode_tokens,
        texts,
        inputs=len(texts),
        cut=body.truncate,
        prompt=body.prompt_name,
    )
    return success(
        [finite(one.vectors, "embedding") for one in found],
        call,
        characters=characters(texts),
        truncated=sum(one.truncated for one in found),
    )


@router.post("/embed_sparse")
async def embed_sparse(body: EmbedAllBody, request: Request) -> Response:
    """Sparse vectors, which no bundle has."""
    served = state_of(request).models.pick(body.model, Embedder)
    raise Refusal(f"{served.name} is no sparse embedding model. Use /embed.", 424)


@router.post("/predict")
async def predict(body: PredictBody, request: Request) -> Response:
    """Labels with scores, best first; of a batch a list of lists."""
    state = state_of(request)
    served = state.models.pick(body.model, Scorer)
    check_direction(body)
    scorer = served.model
    assert isinstance(scorer, Scorer)
    rows, batched = _predictions(body.inputs)
    inputs: list[Any] = []
    for i, row in enumerate(rows):
        if len(row) != (2 if scorer.takes_pairs else 1):
            kind = "pairs of texts" if scorer.takes_pairs else "single texts"
            raise Refusal(
                f"{served.name} scores {kind}; input {i} has {len(row)} texts."
            )
        inputs.append(tuple(row) if scorer.takes_pairs else row[0])
    log_fields(request, served, inputs=len(inputs))
    (scores, cut), call = await state.run(
        served,
        scorer.score_with_truncation,
        inputs,
        inputs=len(inputs),
        cut=body.truncate,
        activation="none" if body.raw_scores else None,
    )
    found = [
        sorted(
            (
                {"score": score, "label": label}
                for label, score in zip(scorer.labels, row, strict=True)
            ),
            key=lambda one: -one["score"],
        )
        for row in finite(scores.reshape(len(inputs), -1))
    ]
    return success(
        found if batched else found[0],
        call,
        characters=characters(inputs),
        truncated=int(cut.sum()),
    )


def _predictions(
    inputs: str | list[str] | list[list[str]],
) -> tuple[list[list[str]], bool]:
    """A text is one; a list of two texts is a pair; a list of lists is a batch."""
    if isinstance(inputs, str):
        return [[inputs]], False
    if inputs and all(isinstance(one, str) for one in inputs):
        return [inputs], False  # type: ignore[list-item]
    return inputs, True  # type: ignore[return-value]


@router.post("/rerank")
async def rerank(body: RerankBody, request: Request) -> Response:
    """Texts by how well they answer the query, best first."""
    state = state_of(request)
    served = state.models.pick(body.model, Scorer)
    check_direction(body)
    scorer = served.model
    assert isinstance(scorer, Scorer)
    if not scorer.takes_pairs or len(scorer.labels) != 1:
        raise Refusal(f"{served.name} does not give pairs of texts one score.")
    if (body.texts is None) == (body.documents is None):
        raise Refusal("Give texts, or documents, and not both.", param="texts")
    texts = body.texts if body.documents is None else body.documents
    assert texts is not None
    log_fields(request, served, inputs=len(texts))
    (scores, cut), call = await state.run(
        served,
        scorer.score_with_truncation,
        [(body.query, text) for text in texts],
        inputs=len(texts),
        cut=body.truncate,
        activation="none" if body.raw_scores else "sigmoid",
    )
    values = finite(scores)
    order = sorted(range(len(texts)), key=lambda i: -values[i])  # stable
    count, truncated = len(body.query) * len(texts) + characters(texts), int(cut.sum())
    if body.documents is None:
        ranked = [
            {"index": i, "score": values[i]}
            | ({"text": texts[i]} if body.return_text else {})
            for i in order[: body.top_n]
        ]
        return success(ranked, call, characters=count, truncated=truncated)
    results = [
        {"index": i, "relevance_score": values[i]}
        | ({"document": texts[i]} if body.return_documents else {})
        for i in order[: body.top_n]
    ]
    usage = {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
    data: dict[str, Any] = {
        "object": "rerank",
        "results": results,
        "model": served.name,
    }
    data["usage"] = usage
    return success(data, call, characters=count, truncated=truncated)


@router.post("/similarity")
async def similarity(body: SimilarityBody, request: Request) -> Response:
    """Cosines of a sentence with others."""
    state = state_of(request)
    served = state.models.pick(body.model, Embedder)
    options = body.parameters or SimilarityParameters()
    check_direction(options)
    if not body.inputs.sentences:
        raise Refusal("`inputs.sentences` cannot be empty", 400)
    texts = [body.inputs.source_sentence, *body.inputs.sentences]
    log_fields(request, served, inputs=len(texts))
    vectors, cut, call = await embed(
        state, served, texts, cut=options.truncate, prompt=options.prompt_name
    )
    cosines = finite(np.clip(vectors[1:] @ vectors[0], -1, 1))
    return success(cosines, call, characters=characters(texts), truncated=cut)


@router.post("/tokenize")
async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Tokens of texts, none of them cut."""
    state = state_of(request)
    served = state.models.pick(body.model)
    texts = [body.inputs] if isinstance(body.inputs, str) else body.inputs
    prefix = ""
    if body.prompt_name is not None:
        prompts = served.manifest.embedding.prompts if served.manifest.embedding else {}
        if body.prompt_name not in prompts:
            known = ", ".join(sorted(prompts)) or "none"
            raise Refusal(
                f"{served.name} has no prompt {body.prompt_name[:100]!r}. Its prompts: {known}."
            )
        prefix = prompts[body.prompt_name]
    encodings, call = await state.run(
        served,
        served.tokenizer.encode_batch,
        [prefix + text for text in texts],
        inputs=len(texts),
        add_special_tokens=body.add_special_tokens,
    )
    rows = []
    for text, encoding in zip(texts, encodings, strict=True):
        whole, row = prefix + text, []
        for token, name, (start, stop), special in zip(
            encoding.ids,
            encoding.tokens,
            encoding.offsets,
            encoding.special_tokens_mask,
            strict=True,
        ):
            row.append(
                {
                    "id": token,
                    "text": name if special else whole[start:stop],
                    "special": bool(special),
                    "start": None if special else start,
                    "stop": None if special else stop,
                }
            )
        rows.append(row)
    return success(rows, call, characters=characters(texts))


@router.post("/decode")
async def decode_route(body: DecodeBody, request: Request) -> Response:
    """Texts of token ids."""
    state = state_of(request)
    served = state.models.pick(body.model)
    ids: list[Any] = body.ids
    rows = ids if ids and isinstance(ids[0], list) else [ids]
    if not ids:
        raise Refusal("`ids` cannot be empty", 400)
    skip = body.skip_special_tokens
    return reply([decode(served, row, skip_special=skip) for row in rows])


@router.get("/info")
async def info(request: Request, model: str | None = None) -> Response:
    """What a model is, and the limits."""
    state = state_of(request)
    served, limits = state.models.pick(model), state.limits
    manifest, batcher = served.manifest, served.engine.batcher
    return reply(
        {
            "model_id": manifest.model.name,
            "model_sha": manifest.files[manifest.graph.file].sha256,
            "model_dtype": manifest.precision,
            "served_model_name": served.name,
            "model_type": model_type(manifest),
            "max_concurrent_requests": limits.max_queue,
            "max_input_length": manifest.tokenizer.max_length,
            "max_batch_tokens": batcher.max_tokens,
            "max_batch_requests": None,
            "max_client_batch_size": limits.max_client_batch,
            "auto_truncate": limits.auto_truncate,
            "tokenization_workers": served.engine.workers,
            "version": edgelm.__version__,
            "sha": None,
            "docker_label": None,
        }
    )


@router.get("/health")
@router.head("/health", include_in_schema=False)
@router.get("/ping", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
async def health(request: Request) -> Response:
    """200 while requests are taken."""
    if state_of(request).closing:
        raise Refusal("The server is shutting down.", 503)
    return Response()


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    text = state_of(request).metrics.text()
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
