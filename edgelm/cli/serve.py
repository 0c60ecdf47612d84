"""The command serve."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from edgelm.cli.console import Real, emit, say
from edgelm.cli.run import BUILD, PROVIDER, THREADS, WORKERS
from edgelm.cli.sign import TRUSTED_KEY
from edgelm.errors import require


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--api-key",
    envvar="EDGELM_API_KEY",
    show_envvar=True,
    help="Answer only requests that send 'Authorization: Bearer KEY'.",
)
@click.option(
    "--index",
    type=click.Path(path_type=Path),
    help="Search this index at /search; one of the bundles must be its encoder.",
)
@click.option(
    "--max-batch-tokens",
    type=click.IntRange(1),
    help="Limit of a batch: inputs times the longest input; 1 runs every input alone.  [default: what suits "
    "the bundle; 1 in dynamic int8, where neighbours in a batch would change the result]",
)
@click.option(
    "--max-queue",
    type=click.IntRange(1),
    default=1024,
    show_default=True,
    help="Inputs that may wait or run; further requests get 429.",
)
@click.option(
    "--max-client-batch",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Most inputs in one request.",
)
@click.option(
    "--max-request-bytes",
    type=click.IntRange(1),
    default=2_000_000,
    show_default=True,
    help="Longest request body.",
)
@click.option(
    "--timeout",
    type=Real(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds that a request may take to arrive, and then to be answered.",
)
@click.option(
    "--auto-truncate/--no-auto-truncate",
    default=True,
    show_default=True,
    help="Cut texts that are too long, or refuse them, where a request does not say which.",
)
@PROVIDER
@BUILD
@THREADS
@WORKERS
@TRUSTED_KEY
def serve(
    bundles: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    index: Path | None,
    max_batch_tokens: int | None,
    max_queue: int,
    max_client_batch: int,
    max_request_bytes: int,
    timeout: float,
    auto_truncate: bool,
    provider: str | None,
    build: bool,
    threads: int | None,
    workers: int | Literal["auto"],
    trusted_keys: tuple[Path, ...],
) -> None:
    """Serve BUNDLEs over HTTP, as text-embeddings-inference and OpenAI do; docs/service.md.

    A bundle is called by the last part of its path, or write NAME=PATH. When requests are
    taken, a JSON line with the url comes on stdout; the log is JSON lines on stderr.

    \b
    edgelm serve bundle
    edgelm serve bundle ner=ner-bundle --port 8080 --index index
    """
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        require(module, "serve")
    from edgelm.runtimes.service.app import create_app
    from edgelm.runtimes.service.models import Models, open_models
    from edgelm.runtimes.service.server import listen
    from edgelm.runtimes.service.server import serve as run
    from edgelm.runtimes.service.state import Limits

    if api_key == "":
        raise click.UsageError("The API key is empty.")
    limits = Limits(
        max_queue=max_queue,
        max_client_batch=max_client_batch,
        max_request_bytes=max_request_bytes,
        max_batch_tokens=max_batch_tokens,
        timeout_s=timeout,
        auto_truncate=auto_truncate,
    )
    with listen(host, port) as bound:
        served = open_models(
            bundles,
            max_batch_tokens=max_batch_tokens,
            max_queue=max_queue,
            provider=provider,
            build=build and say,
            threads=threads,
            workers=workers,
            trusted_keys=trusted_keys or None,
        )
        app = create_app(Models(served, index), limits, api_key=api_key)
        port = bound.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host

        def ready() -> None:
            emit({"url": f"http://{shown}:{port}", "host": host, "port": port})
            names = ", ".join(one.name for one in served)
            say(f"Serving {names} at http://{shown}:{port}; stop with Ctrl-C")

        run(app, bound, ready=ready, grace_s=timeout)


COMMANDS = {"serve": serve}
