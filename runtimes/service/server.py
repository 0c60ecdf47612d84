"""The process: a socket, uvicorn, signals, logs."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from edgelm.errors import InputError
from edgelm.runtimes.service.front import JsonLines


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound.

    Raises:
        InputError: The port is taken, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns off Nagle's delay (40 ms an answer) only where the protocol is named.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"Cannot listen on {host} port {port}: {why}. Choose another with --host and --port."
        ) from error
    return bound


def serve(
    app: FastAPI, bound: socket.socket, *, ready: Callable[[], None], grace_s: float
) -> None:
    """Serve until SIGTERM or SIGINT; then answer what was accepted, and return.

    Args:
        app: The service.
        bound: What to listen on.
        ready: Called when requests are taken.
        grace_s: Seconds that answers may take after the signal.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("edgelm.service", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        server_header=False,
        timeout_graceful_shutdown=int(grace_s) + 1,
    )
    server = _Server(config)
    server.ready = ready
    server.run(sockets=[bound])


class _Server(uvicorn.Server):
    """Says when it is ready, and has /health say when it is not any more."""

    ready: Callable[[], None]

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Without raising the signal again at the end: a server that was asked to stop has not failed."""
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.config.app.state.edgelm.closing = True  # type: ignore[union-attr]
        await super().shutdown(sockets)
