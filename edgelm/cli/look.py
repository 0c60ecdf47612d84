"""Commands that only look: targets, info, doctor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm import schema
from edgelm.cli.console import emit, say, show_table
from edgelm.errors import InputError


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines on stdout.")
@click.option(
    "--fit",
    "model",
    metavar="MODEL",
    help="Predict how much memory a model needs there, to build its engine and to run.",
)
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    help="With --fit: the precision of the export; auto is the target's default.",
)
def targets(name: str | None, as_json: bool, model: str | None, precision: str) -> None:
    """List the devices that edgelm exports for, or show the facts about one.

    \b
    edgelm targets jetson-orin-nano
    edgelm targets jetson-orin-nano --fit minilm
    """
    from edgelm.targets import FAMILIES, RIVALS, list_targets, load_target, target_text
    from edgelm.targets.board import family_member

    if model is not None:
        if name is None:
            raise click.UsageError("--fit needs the name of a target.")
        _show_fit(name, model, precision, as_json)
        return
    if name is not None:
        target = load_target(name)
        if as_json:
            emit(schema.plain(target))
        else:
            click.echo(target_text(target.name), nl=False)
        return
    found = [load_target(target) for target in list_targets()]
    if as_json:
        for target in found:
            emit(schema.plain(target))
        return
    rows: list[tuple[str, ...]] = [
        (t.name, t.title, t.runtime, " ".join(t.precisions)) for t in found
    ]
    rows += [
        (
            family,
            "family; here: {0.target} ({0.why})".format(family_member(family)),
            "",
            "",
        )
        for family in FAMILIES
    ]
    rows += [
        (rivals, "what export measures to be faster here", " or ".join(members), "")
        for rivals, members in RIVALS.items()
    ]
    show_table("Targets", ("name", "device", "runtime", "precisions"), rows)


def _show_fit(name: str, model: str, precision: str, as_json: bool) -> None:
    from edgelm.export.fitting import fit
    from edgelm.export.precision import check_precision
    from edgelm.models import load_model
    from edgelm.targets import load_target

    target = load_target(name)
    chosen = target.default_precision if precision == "auto" else precision
    check_precision(target, chosen)
    found = fit(load_model(model), target, chosen)
    if as_json:
        emit({"target": target.name, "precision": chosen, **schema.plain(found)})
        return
    free = "" if found.available_mib is None else f" of {found.available_mib} MiB"
    build = (
        f", {found.build_mib:.0f} MiB to build the engine" if found.build_mib else ""
    )
    say(
        f"{model} in {chosen} on {target.title}: weights {found.weights_mib:.0f} MiB; predicted "
        f"{found.run_mib:.0f} MiB to run{build}{free}"
    )
    for note in found.notes:
        say(f"{target.title}: {note}")


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def info(path: Path, as_json: bool) -> None:
    """Say what PATH is: a bundle or a checkpoint, and where it comes from.

    \b
    edgelm info bundle
    """
    from edgelm.provenance import describe

    about = _about(path)
    if as_json:
        emit(about)
        return
    hidden = ("lineage", "provenance", "recipe", "steps", "calibration_digest")
    show_table(
        str(path),
        ("", ""),
        [(key, _short(value)) for key, value in about.items() if key not in hidden],
    )
    show_table(
        "From the original weights to here", ("", ""), describe(about["lineage"])
    )


def _about(path: Path) -> dict[str, Any]:
    from edgelm import provenance
    from edgelm.bundle import SIGNATURE, is_bundle, open_bundle
    from edgelm.schema import read_json
    from edgelm.signing import read_signature

    if is_bundle(path):
        bundle = open_bundle(path)
        packed = bundle.archive.stat().st_size if bundle.archive else None
        signed = (bundle.path / SIGNATURE).is_file()
        # Whose it says it is; that it is, only verify-signature can tell.
        key = read_signature(bundle.path).key if signed else None
        return {
            "kind": "bundle",
            "size_bytes": bundle.size_bytes,
            "archive_bytes": packed,
            "signed_with_key": key,
            **schema.plain(bundle.manifest),
            "lineage": provenance.of_bundle(bundle.manifest),
        }
    if (path / "edgelm.json").is_file():
        about = read_json(path / "edgelm.json")
        about["layers"] = len(about.pop("report"))
        lineage = provenance.of_checkpoint(about)
        return {"kind": "checkpoint", **about, "lineage": lineage}
    if not path.exists():
        raise InputError(f"{path} does not exist. Name a bundle or a checkpoint.")
    raise InputError(
        f"{path} is neither a bundle (manifest.json) nor a checkpoint (edgelm.json) of edgelm."
    )


def _short(value: Any) -> str:
    text = (
        ", ".join(f"{k} {_short(v)}" for k, v in value.items())
        if isinstance(value, dict)
        else str(value)
    )
    return text if len(text) <= 400 else text[:397] + "..."


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines on stdout.")
def doctor(as_json: bool) -> None:
    """Say what is installed here, what works, and what to mend.

    \b
    edgelm doctor
    """
    from edgelm.doctor import examine

    findings = examine()
    for finding in findings:
        if as_json:
            emit(schema.plain(finding))
        else:
            say(
                f"{finding.state:7} {finding.what}: {finding.found}"
                + (f" -> {finding.fix}" if finding.fix else "")
            )
    if any(finding.state == "broken" for finding in findings):
        raise SystemExit(1)


@click.command()
@click.argument("path", metavar="GRAPH|BUNDLE", type=click.Path(path_type=Path))
@click.option(
    "--tensorrt",
    multiple=True,
    metavar="VERSION",
    help="Version of TensorRT to check for; repeatable.  [default: those of the bundle's target, or 10.3]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines on stdout.")
def lint(path: Path, tensorrt: tuple[str, ...], as_json: bool) -> None:
    """Check an ONNX graph against the rules of TensorRT's parser; exit 3 if it breaks any.

    \b
    edgelm lint bundle
    """
    from edgelm.bundle import MANIFEST, open_bundle
    from edgelm.errors import GateError
    from edgelm.export.lint import lint as check
    from edgelm.targets import load_target

    graph = path
    if path.is_dir() or path.name == MANIFEST:
        bundle = open_bundle(path if path.is_dir() else path.parent)
        graph = bundle.file(bundle.manifest.graph.file)
        engine = load_target(bundle.manifest.target).engine
        tensorrt = tensorrt or (engine.tensorrt if engine else ())
    elif not path.is_file():
        raise InputError(f"{path} does not exist. Name an ONNX file or a bundle.")
    versions = tensorrt or ("10.3",)
    problems = check(graph, versions)
    for problem in problems:
        if as_json:
            emit(schema.plain(problem))
        else:
            say(f"{problem.rule}: {problem.what}")
    if problems:
        raise GateError(
            f"{graph} breaks {len(problems)} rules of TensorRT {', '.join(versions)}."
        )
    say(f"{graph}: nothing that TensorRT {', '.join(versions)} is known to refuse")


COMMANDS = {"targets": targets, "info": info, "doctor": doctor, "lint": lint}
