"""The routes of OpenAI."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request, Response

from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.service.bodies import OPENAI_ERRORS, OpenAIBody
from edgelm.runtimes.service.embedding import as_texts, embed
from edgelm.runtimes.service.models import Served
from edgelm.runtimes.service.replies import Refusal, reply, success
from edgelm.runtimes.service.state import characters
from edgelm.runtimes.service.tei import log_fields, state_of

router = APIRouter(prefix="/v1", responses=OPENAI_ERRORS, tags=["OpenAI"])


@router.post("/embeddings")
async def embeddings(body: OpenAIBody, request: Request) -> Response:
    """Vectors, as floats or as little-endian float32 in base64."""
    state = state_of(request)
    served = state.models.pick(body.model, Embedder)
    if not body.input or (isinstance(body.input, list) and "" in body.input):
        raise Refusal("The input cannot be empty.", 400, param="input")
    texts = as_texts(served, body.input)
    log_fields(request, served, inputs=len(texts))
    vectors, cut, call = await embed(state, served, texts, dimensions=body.dimensions)
    rows: list[Any] = vectors.tolist()
    if body.encoding_format == "base64":
        rows = [
            base64.b64encode(row.astype("<f4").tobytes()).decode() for row in vectors
        ]
    data = [
        {"object": "embedding", "index": i, "embedding": row}
        for i, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": call.tokens, "total_tokens": call.tokens}
    return success(
        {"object": "list", "data": data, "model": served.name, "usage": usage},
        call,
        characters=characters(texts),
        truncated=cut,
    )


@router.get("/models")
async def models(request: Request) -> Response:
    """What is served."""
    data = [_describe(one) for one in state_of(request).models.all]
    return reply({"object": "list", "data": data})


@router.get("/models/{name}")
async def model(name: str, request: Request) -> Response:
    """One model."""
    return reply(_describe(state_of(request).models.pick(name)))


def _describe(served: Served) -> dict[str, Any]:
    about = {"id": served.name, "object": "model", "created": served.since}
    return {**about, "owned_by": "edgelm"}
