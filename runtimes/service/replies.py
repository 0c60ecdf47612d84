"""What is sent back: JSON, the headers of a success, and errors in the shape of their route."""

from __future__ import annotations

from typing import Any

from fastapi import Response
from pydantic_core import to_json

from edgelm.errors import (
    ClosedError,
    DeadlineError,
    EdgelmError,
    InputError,
    OverloadError,
)
from edgelm.runtimes.calls import Call

# Error type of text-embeddings-inference, and of OpenAI, by status.
_TEI = {400: "Empty", 424: "Backend", 429: "Overloaded", 500: "Backend"}
_TEI |= {503: "Unhealthy"}
_OPENAI = {429: "rate_limit_error", 424: "server_error", 500: "server_error"}
_OPENAI |= {503: "server_error"}
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}


class Refusal(EdgelmError):
    """A request that is not served, with its status."""

    def __init__(
        self,
        message: str,
        status: int = 422,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        """Say why.

        Args:
            message: One sentence.
            status: HTTP status.
            kind: Error type on the routes of text-embeddings-inference, where it is not the
                one of the status.
            param: The field of the request that is at fault.
            code: OpenAI's code of the error.
        """
        super().__init__(message)
        self.status, self.kind, self.param, self.code = status, kind, param, code


def as_refusal(error: Exception) -> Refusal:
    """Any error as one that has a status."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, InputError):
        return Refusal(str(error))
    if isinstance(error, (OverloadError, DeadlineError)):
        return Refusal(str(error), 429)
    if isinstance(error, ClosedError):
        return Refusal("The server is shutting down.", 503)
    if isinstance(error, EdgelmError):
        return Refusal(str(error), 424)
    return Refusal("The server failed; its log says how.", 500)


def error_reply(path: str, refusal: Refusal) -> Response:
    """An error in the shape of its route: OpenAI's under ``/v1``, else that of TEI."""
    status, message = refusal.status, str(refusal)
    headers = {}
    if status == 429:
        headers["retry-after"] = "1"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    data: dict[str, Any]
    if path.startswith("/v1"):
        status = 400 if status == 422 else status
        data = {
            "error": {
                "message": message,
                "type": _OPENAI.get(status, "invalid_request_error"),
                "param": refusal.param,
                "code": refusal.code or _CODES.get(status),
            }
        }
    else:
        kind = refusal.kind or _TEI.get(status, "Validation")
        data = {"error": message, "error_type": kind}
    return reply(data, status=status, headers=headers)


def reply(
    data: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """JSON; text that is not Unicode becomes replacement characters."""
    body = to_json(data, inf_nan_mode="null")
    return Response(body, status, headers, media_type="application/json")


def success(
    data: Any, call: Call, *, characters: int, truncated: int = 0, device: str = "cpu"
) -> Response:
    """JSON, and what it cost; times in milliseconds, as text-embeddings-inference gives them."""
    headers = {
        "x-compute-type": device,
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(call.tokens),
        "x-compute-time": _ms(call.tokenize_s + call.inference_s),
        "x-tokenization-time": _ms(call.tokenize_s),
        "x-queue-time": _ms(call.queue_s),
        "x-inference-time": _ms(call.inference_s),
        "x-edgelm-truncated": str(truncated),
    }
    return reply(data, headers=headers)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3f}"
