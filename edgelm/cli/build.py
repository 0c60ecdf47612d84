"""The command build."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm import schema
from edgelm.cli.console import emit, say


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Build again what was built already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def build(bundle: Path, force: bool, as_json: bool) -> None:
    """Build, verify and keep the TensorRT engine of BUNDLE on this device.

    The engine stays in the user's cache; run, verify and bench use it from there.

    \b
    edgelm build bundle
    """
    from edgelm.bundle import open_bundle
    from edgelm.runtimes.tensorrt.builder import build_engine

    record = build_engine(open_bundle(bundle), force=force, progress=say)
    if as_json:
        emit(schema.plain(record))
    times = ", ".join(f"{name} {ms:.2f} ms" for name, ms in record.median_ms.items())
    types = ", ".join(f"{count} {name}" for name, count in record.layer_types.items())
    say(
        f"engine for {record.key.device} (TensorRT {record.key.tensorrt}): {record.snr_db:.1f} dB to the original "
        f"model; layers by type: {types}; golden texts in {times}"
    )
    if record.sparse_eligible:
        say(
            f"2:4: {len(record.sparse_eligible)} layers eligible, {len(record.sparse_picked)} use a sparse kernel"
        )


COMMANDS = {"build": build}
