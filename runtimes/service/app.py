"""The ASGI app."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import edgelm
from edgelm.errors import EdgelmError
from edgelm.runtimes.service import openai, own, tei
from edgelm.runtimes.service.front import Front
from edgelm.runtimes.service.models import Models
from edgelm.runtimes.service.replies import Refusal, as_refusal, error_reply
from edgelm.runtimes.service.state import Limits, State


def create_app(
    models: Models, limits: Limits | None = None, *, api_key: str | None = None
) -> FastAPI:
    """The service over some models, which it closes when it ends.

    Args:
        models: What is served.
        limits: What is taken.
        api_key: What requests must bring; None lets everybody in.
    """
    state = State(models, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        state.closing = True
        state.close()

    app = FastAPI(
        title="edgelm",
        version=edgelm.__version__,
        docs_url=None,  # these pages load scripts from the network
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.edgelm = state
    for router in (own.router, tei.router, openai.router):
        app.include_router(router)
    app.add_api_route(
        "/embeddings", openai.embeddings, methods=["POST"], include_in_schema=False
    )
    app.add_exception_handler(EdgelmError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_middleware(Front, state=state, api_key=api_key)
    return app


def _refused(request: Request, error: Exception) -> Response:
    return error_reply(request.url.path, as_refusal(error))


def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong, by its place; never the value, which may be a text."""
    assert isinstance(error, RequestValidationError)
    first = _clearest(error.errors())
    # Behind a field's name pydantic writes which type of a union it tried.
    fields = [part for part in first["loc"] if part != "body"]
    named = [str(p) for p in fields[:1]] + [str(p) for p in fields if type(p) is int]
    place = ".".join(dict.fromkeys(named))
    message = str(first["msg"]).removeprefix("Value error, ")
    status = 422
    if first["type"] == "json_invalid":
        status, place = 400, ""
        message = f"The body is not JSON: {first['ctx']['error']}."
    elif not place and first["loc"] == ("body",):
        message = "The body must be a JSON object, with the header 'content-type: application/json'."
    if place:
        message = f"{place}: {message}"
    param = place.partition(".")[0] or None
    refusal = Refusal(message, status, kind="Validation", param=param)
    return error_reply(request.url.path, refusal)


def _clearest(errors: Sequence[Any]) -> dict[str, Any]:
    """Of what is wrong with the first field: pydantic tells it of every type that the field may have.

    A value of a type that it may have says most, then what lies deepest.
    """
    field = errors[0]["loc"][:2]
    return dict(
        max(
            (error for error in errors if error["loc"][:2] == field),
            key=lambda e: (not e["type"].endswith("_type"), len(e["loc"])),
        )
    )


def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(str(error.detail), error.status_code, kind="Validation")
    response = error_reply(request.url.path, refusal)
    response.headers.update(error.headers or {})
    return response
