"""The command verify."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from edgelm.cli.console import emit, say
from edgelm.cli.run import PROVIDER, THREADS
from edgelm.cli.sign import TRUSTED_KEY


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@PROVIDER
@THREADS
@TRUSTED_KEY
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def verify(
    bundle: Path,
    provider: str | None,
    threads: int | None,
    trusted_keys: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Check BUNDLE's files and replay its golden examples; exit 3 where it fails.

    \b
    edgelm verify bundle
    """
    from edgelm.bundle import open_bundle
    from edgelm.golden import load_golden
    from edgelm.runtimes.engine import open_engine
    from edgelm.runtimes.verification import verify as replay

    opened = open_bundle(bundle, trusted_keys=trusted_keys or None)
    engine = open_engine(opened, threads=threads, provider=provider)
    result = replay(engine, load_golden(opened))
    if as_json:
        emit({"bundle": str(bundle), **asdict(result)})
    say(
        f"{bundle} is whole and agrees with the original model: {result.snr_db:.1f} dB over "
        f"{result.examples} golden examples on {result.provider} (at least {result.min_snr_db:.1f} dB are due)"
    )


COMMANDS = {"verify": verify}
