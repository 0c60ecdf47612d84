"""The command export."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgelm.cli.console import OUTPUT, TASKS, Real, console, emit, say, show_table

if TYPE_CHECKING:
    from edgelm.export.explain import Explanation


class _Layer(click.IntRange):
    """A number, or the word last, which is -1."""

    name = "LAYER"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        return -1 if value == "last" else super().convert(value, param, ctx)


@click.command()
@click.argument("checkpoint")
@click.option(
    "--target", required=True, help="Device to export for; `edgelm targets` lists them."
)
@click.option(
    "-o",
    "--output",
    type=OUTPUT,
    required=True,
    help="Bundle to make: a folder, or one file if its name ends in .tar.zst.",
)
@click.option(
    "--precision",
    type=click.Choice(
        ["auto", "fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights"]
    ),
    default="auto",
    show_default=True,
    help="auto: the target's default; with --max-drop, auto also leaves layers in float where that is needed.",
)
@click.option(
    "--max-drop",
    type=Real(min=0),
    metavar="X",
    help="How much the precision may cost on held-out calibration text: 1 - cosine (embeddings), "
    "share of changed entity labels (ner), 1 - Spearman or change of a score (scoring).",
)
@click.option(
    "--block-size",
    "block",
    type=click.Choice(["32", "64", "128"]),
    default="32",
    show_default=True,
    help="Weights that share a scale, for int8-weights and int4-weights.",
)
@click.option(
    "--embedding-bits",
    "table_bits",
    type=click.Choice(["8", "4"]),
    default="8",
    show_default=True,
    help="Bits of large embedding tables, in integer precisions; 4 only for ONNX Runtime.",
)
@click.option(
    "--calibration",
    "texts",
    default="built-in",
    show_default=True,
    metavar="FILE",
    help="Texts for ranges, and (every eighth) for measuring the drop: .txt or .jsonl, also .gz and .zst.",
)
@click.option(
    "--min-snr-db",
    type=Real(),
    help="Least agreement with the original model that is accepted, in dB; the manifest records it.",
)
@click.option(
    "--codes-output",
    is_flag=True,
    help="Let the graph also return packed binary codes, beside the embeddings.",
)
@click.option(
    "--token-embeddings",
    type=_Layer(0),
    metavar="LAYER",
    help="Let the graph also return token vectors, which `edgelm ner-index` needs: those after the layer "
    "with this number (0: the embedding table), or last.",
)
@click.option(
    "--explain",
    "explained",
    is_flag=True,
    help="Show the graph's operators, what the runtime fuses of them, and the precision of each product.",
)
@click.option(
    "--domain",
    metavar="NAME",
    help="For a checkpoint with experts by domain: the domain to export; the bundle holds only its experts.",
)
@click.option("--task", type=TASKS, help="What the model is for.  [default: inferred]")
@click.option("--force", is_flag=True, help="Replace a bundle that is there already.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the result as a JSON line on stdout."
)
def export(
    checkpoint: str,
    target: str,
    output: Path,
    precision: str,
    max_drop: float | None,
    block: str,
    table_bits: str,
    texts: str,
    min_snr_db: float | None,
    codes_output: bool,
    token_embeddings: int | None,
    explained: bool,
    domain: str | None,
    task: Any,
    force: bool,
    as_json: bool,
) -> None:
    """Make a verified bundle for a device from CHECKPOINT (or any model).

    \b
    edgelm export small --target cpu -o bundle --precision int8
    """
    from edgelm.archive import SUFFIX, new_bundle
    from edgelm.atomic import check_free
    from edgelm.bundle import MANIFEST
    from edgelm.export import RANGES, explain, export_fastest
    from edgelm.export import export as export_bundle
    from edgelm.models import load_model
    from edgelm.targets import FAMILIES, RIVALS, load_target
    from edgelm.targets.board import family_member

    for name in RIVALS.get(target, (target,)):
        load_target(name)
    packed = output.name.endswith(SUFFIX)
    check_free(output, marker=None if packed else MANIFEST, force=force)
    if target in FAMILIES:
        member = family_member(target)
        say(
            f"{target} is a family of devices; exporting for {member.target}: {member.why}."
        )
    with (
        console.status(f"exporting {checkpoint}") as status,
        new_bundle(output, force=force) as folder,
    ):
        loaded = load_model(checkpoint, task, domain=domain)
        options: dict[str, Any] = {
            "precision": precision,
            "calibration": replace(RANGES, texts=texts),
            "block": int(block),
            "table_bits": int(table_bits),
            "max_drop": max_drop,
            "min_snr_db": min_snr_db,
            "codes_output": codes_output,
            "token_embeddings": token_embeddings,
            "force": force,
            "progress": lambda what: status.update(f"{checkpoint}: {what}"),
        }
        if target in RIVALS:
            bundle, rates = export_fastest(loaded, RIVALS[target], folder, **options)
        else:
            bundle, rates = export_bundle(loaded, target, folder, **options), {}
        size = bundle.size_bytes
        explanation = explain(bundle) if explained else None
    manifest = bundle.manifest
    about = manifest.provenance["precision"]
    device = load_target(manifest.target)
    for note in manifest.provenance["fit"]["notes"]:
        say(f"{device.title}: {note}")
    for name, rate in rates.items():
        say(f"{name}: {rate:.0f} texts a second on this machine")
    if as_json:
        shown = {} if explanation is None else {"explain": _plain(explanation)}
        emit(
            {
                "bundle": str(output),
                "task": manifest.task,
                "target": manifest.target,
                "precision": manifest.precision,
                "size_bytes": size,
                "archive_bytes": output.stat().st_size if packed else None,
                "snr_db": manifest.golden.measured_snr_db,
                "drop": about.get("drop"),
                "routing": about.get("routing"),
                **shown,
            }
        )
    sizes = f"{size / 1e6:.1f} MB"
    if packed:
        sizes = f"{output.stat().st_size / 1e6:.1f} MB packed, {sizes} unpacked"
    if explanation is not None:
        _show(explanation)
    say(
        f"{output}: {manifest.task}, {manifest.precision}, for {device.title}; "
        f"{sizes}, {manifest.golden.measured_snr_db:.1f} dB to the original model"
    )
    if "drop" in about:
        say(f"drop {about['drop']:.2g} ({about['measure']}), on held-out text")
    if routing := about.get("routing"):
        p50 = routing["p50_ms"]
        each = ", ".join(
            f"{n} tokens {ms:.3g} ms (static {p50['static'][n]:.3g} ms)"
            for n, ms in p50["routed"].items()
        )
        say(f"routed experts, p50 on this machine: {each}")
    if layers := about.get("layers"):
        kept = [
            name for g in layers if g["precision"] == "fp32" for name in g["layers"]
        ]
        count = sum(len(g["layers"]) for g in layers)
        say(
            f"in float: {len(kept)} of {count} matrix products"
            + (f": {', '.join(kept)}" if kept else "")
        )
    if device.engine is not None:
        say("Its engine is built on the device: edgelm build BUNDLE.")
        if checked := about.get("checked"):
            say(f"Checked in {checked}.")
        else:
            say("The ONNX graph also runs with --provider CPUExecutionProvider.")


def _plain(explanation: Explanation) -> dict[str, Any]:
    return {**asdict(explanation), "fused": explanation.fused}


def _show(explanation: Explanation) -> None:
    operators, optimised = explanation.operators, explanation.optimised
    names = sorted({*operators, *optimised}, key=lambda n: (n in operators, n))
    show_table(
        "Operators",
        ("operator", "graph", f"after {explanation.optimiser or 'optimisation'}"),
        [
            (name, operators.get(name, ""), optimised.get(name, ""))
            if explanation.optimiser
            else (name, operators[name], "on the device")
            for name in names
        ],
    )
    if explanation.optimiser:
        made = ", ".join(f"{n} {kind}" for kind, n in explanation.fused.items())
        say(f"{explanation.optimiser} made of them: {made or 'nothing new'}")
    show_table(
        "Weights",
        ("layer", "kind", "weights", "precision", "why"),
        [
            (w.layer, w.kind, w.weights, w.precision, explanation.reason(w))
            for w in explanation.weights
        ],
    )


COMMANDS = {"export": export}
