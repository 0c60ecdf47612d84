"""Provenance: the chain from the original weights to a checkpoint or a bundle, as each carries it.

    {"version": 1,
     "origin": {name, architecture, source_digest, licence, revision},
     "steps": [{action: compress | changed | export | fit-head, by, ..., versions, machine}, ...]}

It stands under ``lineage`` in a checkpoint's `edgelm.json` and in the provenance of a bundle's manifest. Nothing in it
is a time or a name of a host: the same work on the same machine gives the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import edgelm
from edgelm import sentence
from edgelm.bundle import file_digest
from edgelm.manifest import Manifest
from edgelm.schema import read_json

if TYPE_CHECKING:
    from edgelm.models import LoadedModel

VERSION = 1
# What decides about the numbers of a compression, of an export, of a head.
COMPRESSES = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
RUNS = ("onnxruntime", "tokenizers", "numpy")
EXPORTS = ("torch", "transformers", "onnx", "onnxscript", *RUNS)

Lineage = dict[str, Any]


def done(action: str, packages: Sequence[str], **about: Any) -> dict[str, Any]:
    """A step of the chain, done here and now; None among ``about`` is left out."""
    return {
        "action": action,
        "by": f"edgelm {edgelm.__version__}",
        **{key: value for key, value in about.items() if value is not None},
        "versions": versions(packages),
        "machine": machine(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """This machine: its CPU, architecture, CPUs and system; not its name."""
    from edgelm.runtimes.workers import cpu_name

    return {
        "cpu": cpu_name(),
        "arch": platform.machine(),
        "cpus": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
    }


def weights_digest(folder: Path) -> str:
    """SHA-256 (hex) of a checkpoint's weights: of the file, or over those of several."""
    files = [
        *sorted(folder.glob("model*.safetensors")),
        *sorted(folder.glob("*.experts")),  # of domains, or routers
        *sentence.weight_files(folder),
    ]
    digests = [file_digest(path) for path in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def lineage_of(loaded: LoadedModel) -> Lineage:
    """The chain up to a loaded model, with a step ``changed`` where its weights are not those recorded."""
    about = read_json(loaded.folder / "edgelm.json")
    if "lineage" in about:
        found: Lineage = about["lineage"]
    else:
        origin = {
            "name": loaded.name,
            "architecture": loaded.architecture,
            "source_digest": loaded.source_digest,
        }
        # Of a checkpoint from before chains were kept the original's files are not at hand.
        more = {} if about else _card(loaded.folder)
        steps = [_old_step(about)] if about else []
        found = {"version": VERSION, "origin": {**origin, **more}, "steps": steps}
    known = [step["weights"] for step in found["steps"] if "weights" in step]
    if known and (digest := weights_digest(loaded.folder)) != known[-1]:
        return extend(found, {"action": "changed", "weights": digest})
    return found


def extend(lineage: Mapping[str, Any], *steps: Mapping[str, Any]) -> Lineage:
    """The same chain with further steps."""
    return {**lineage, "steps": [*lineage["steps"], *steps]}


def of_checkpoint(about: Mapping[str, Any]) -> Lineage:
    """The chain of a checkpoint, from its `edgelm.json`; of an old one what there is."""
    if "lineage" in about:
        return dict(about["lineage"])
    return {"version": VERSION, "origin": about["model"], "steps": [_old_step(about)]}


def of_bundle(manifest: Manifest) -> Lineage:
    """The chain of a bundle, from its manifest; of an old one what there is."""
    about, model = manifest.provenance, manifest.model
    if "lineage" in about:
        return dict(about["lineage"])
    origin = {
        "name": model.name,
        "architecture": model.architecture,
        "source_digest": model.source_digest,
    }
    steps: list[dict[str, Any]] = [_old_step(about)] if about.get("recipe") else []
    exported = {
        "action": "export",
        "by": manifest.created_by,
        "target": manifest.target,
        "precision": manifest.precision,
        "versions": about.get("versions", {}),
    }
    return {"version": VERSION, "origin": origin, "steps": [*steps, exported]}


def _old_step(about: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "by": about.get("created_by"),
        "recipe": about.get("recipe"),
        "calibration": {"digest": about.get("calibration_digest")},
    }
    return {"action": "compress", **{k: v for k, v in known.items() if v}}


def _card(folder: Path) -> dict[str, str]:
    """What a model's own files say of its licence, and a hub's folder of its revision."""
    found = {}
    card = folder / "README.md"
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    licence = re.search(
        r"^license:\s*[\"']?([\w.+-]+)", head.group(1) if head else "", re.MULTILINE
    )
    if licence:
        found["licence"] = licence.group(1)
    if folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        found["revision"] = folder.name
    return found


def describe(lineage: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A chain for people: what each link is, and what is known of it."""
    origin = lineage["origin"]
    rows = [
        (
            "original weights",
            _line(
                f"{origin['name']} ({origin.get('architecture', 'architecture not recorded')})",
                origin.get("licence"),
                origin.get("revision") and f"revision {origin['revision']}",
                f"SHA-256 {origin['source_digest']}",
            ),
        )
    ]
    for step in lineage["steps"]:
        rows.append((step["action"], _DESCRIBE[step["action"]](step)))
        if "weights" in step:
            rows.append(("", f"weights SHA-256 {step['weights']}"))
        if made := step.get("versions"):
            rows.append(("", ", ".join(f"{k} {v}" for k, v in made.items())))
        if here := step.get("machine"):
            rows.append(
                (
                    "",
                    f"{here['cpu']} ({here['arch']}, {here['cpus']} CPUs), {here['system']}",
                )
            )
    return rows


def _line(*parts: str | None) -> str:
    return "; ".join(part for part in parts if part)


def _data(step: Mapping[str, Any]) -> str | None:
    data = step.get("calibration")
    if not data:
        return None
    count = f"{data['count']} texts of " if "count" in data else ""
    seed = f"seed {data['seed']}, " if "seed" in data else ""
    return f"{count}{data.get('texts', 'texts')} ({seed}SHA-256 {data['digest']})"


def _compressed(step: Mapping[str, Any]) -> str:
    recipe = step.get("recipe", {})
    words = ["vocabulary"] if "vocabulary" in recipe else []
    for one in recipe.get("steps", ()):
        rest = {k: v for k, v in one.items() if k not in ("method", "version")}
        plain = ", ".join(
            f"{k} {v}"
            for k, v in rest.items()
            if not isinstance(v, (dict, list)) and v is not None
        )
        words.append(f"{one['method']} ({plain})" if plain else one["method"])
    return _line(step.get("by"), *words, _data(step))


def _exported(step: Mapping[str, Any]) -> str:
    options = step.get("options", {})
    return _line(
        step.get("by"),
        f"for {step['target']} in {step['precision']}",
        ", ".join(f"{k} {v}" for k, v in options.items() if v not in (None, False)),
        _data(step),
    )


def _fitted(step: Mapping[str, Any]) -> str:
    head = step.get("head", {})
    return _line(
        step.get("by"),
        f"{head.get('kind')} head on {head.get('rows')} rows (seed {head.get('seed')}, "
        f"SHA-256 {head.get('data_digest')})",
    )


_DESCRIBE = {
    "compress": _compressed,
    "changed": lambda step: "weights were changed by something else than edgelm",
    "export": _exported,
    "fit-head": _fitted,
}
