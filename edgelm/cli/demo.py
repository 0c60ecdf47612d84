"""The command demo."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.console import say, show_table


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="demo-output",
    show_default=True,
    help="Folder for what it makes.",
)
@click.option("--force", is_flag=True, help="Replace what an earlier demo made.")
def demo(output: Path, force: bool) -> None:
    """Compress, export, verify and run the built-in models; explain each step.

    \b
    edgelm demo
    """
    from edgelm.atomic import check_free, new_folder
    from edgelm.demo import run

    marker = "DEMO"
    check_free(output, marker=marker, force=force)
    with new_folder(output, marker=marker, force=force) as folder:
        (folder / marker).write_text("made by: edgelm demo\n", encoding="utf-8")
        rows = run(folder, say)
    say("")
    show_table(
        "Dense (PyTorch, float32) against its bundle (50 % zeros, int8)",
        (
            "model",
            "size MB",
            "p50 ms",
            "texts/s",
            "quality on the small built-in samples",
        ),
        [
            (
                r.model,
                f"{r.size_mb:.1f}",
                f"{r.p50_ms:.1f}",
                f"{r.texts_per_s:.0f}",
                r.quality,
            )
            for r in rows
        ],
    )
    say(
        f'\nThe bundles are in {output}. Try: edgelm run {output}/minilm-ner-bundle "Your text."'
    )


COMMANDS = {"demo": demo}
