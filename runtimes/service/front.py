"""The door: every request passes here before a route sees it."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgelm.runtimes.service.replies import Refusal, as_refusal, error_reply
from edgelm.runtimes.service.state import State

log = logging.getLogger("edgelm.service")

# What may be read without a key: nothing there is of a model or a text.
_OPEN = {"/", "/health", "/ping"}
# A body that is too large is read and dropped up to this many times the limit, so that the
# client hears why; beyond it the connection is closed.
_DROP = 32


class Front:
    """ASGI middleware: API key, size and time of a request, disconnects, metrics, the log line."""

    def __init__(self, app: ASGIApp, state: State, api_key: str | None) -> None:
        """Stand before an app."""
        self._app, self._state = app, state
        self._key = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size = (
            time.monotonic(),
            499,
            0,
        )  # 499: nobody was there to answer

        async def sent(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                total = 1000 * (time.monotonic() - began)
                message["headers"].append((b"x-total-time", f"{total:.3f}".encode()))
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
            if body is not None:
                await self._serve(scope, body, receive, sent)
        except Refusal as refusal:
            await error_reply(scope["path"], refusal)(scope, receive, sent)
        except Exception as error:
            log.exception("failed", extra={"fields": {"path": scope["path"]}})
            if status == 499:
                failure = error_reply(scope["path"], as_refusal(error))
                await failure(scope, receive, sent)
        finally:
            self._note(scope, status, time.monotonic() - began, size)

    def _check_key(self, scope: Scope) -> None:
        public = scope["path"] in _OPEN and scope["method"] in ("GET", "HEAD")
        if self._key is None or public:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, self._key):
            raise Refusal(
                "The API key is missing or wrong: send it as 'Authorization: Bearer KEY'.",
                401,
                kind="Unauthorized",
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None if the client left."""
        limit = self._state.limits.max_request_bytes
        chunks: list[bytes] = []
        total, more = 0, True

        async def read() -> bool:
            nonlocal total, more
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return False
                chunk = message.get("body", b"")
                total += len(chunk)
                if total <= limit:
                    chunks.append(chunk)
                elif total > _DROP * limit:
                    break
                more = message.get("more_body", False)
            return True

        timeout = self._state.limits.timeout_s
        try:
            whole = await asyncio.wait_for(read(), timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise Refusal(
                f"The request did not arrive within {timeout:g} s.", 408
            ) from None
        if whole and total > limit:
            raise Refusal(
                f"The request is longer than {limit} bytes. Send fewer or shorter texts at once.",
                413,
            )
        return b"".join(chunks) if whole else None

    async def _serve(
        self, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Serve a request that is here; stop when the client leaves."""
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        work = asyncio.ensure_future(self._app(scope, replay, send))
        leave = asyncio.ensure_future(gone())
        try:
            await asyncio.wait({work, leave}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
            if not work.cancelled():
                work.result()
        finally:
            leave.cancel()
            work.cancel()

    def _note(
        self, scope: MutableMapping[str, Any], status: int, seconds: float, size: int
    ) -> None:
        # A path that is no route would be a label without end.
        route = getattr(scope.get("route"), "path", None) or (
            scope["path"] if scope["path"] in _OPEN else "other"
        )
        metrics = self._state.metrics
        metrics.requests.labels(scope["method"], route, status).inc()
        metrics.seconds.labels(route).observe(seconds)
        log.info(
            "request",
            extra={
                "fields": {
                    "method": scope["method"],
                    "path": scope["path"][:200],
                    "status": status,
                    "ms": round(1000 * seconds, 3),
                    "bytes": size,
                    **scope.get("edgelm", {}),
                }
            },
        )


class JsonLines(logging.Formatter):
    """A log record as a JSON line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line: time, level, event, and the record's ``fields``."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)
