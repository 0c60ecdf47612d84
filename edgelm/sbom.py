"""The bill of materials in a bundle: CycloneDX 1.6 in JSON, the same bytes for the same bundle.

Written as plain data: the library for CycloneDX has no model cards, and a device that fits a head writes one as well.
The tests validate it with that library. Source: ECMA-424 (CycloneDX 1.6).
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgelm import provenance
from edgelm.bundle import MANIFEST, SBOM, SIGNATURE, file_digest
from edgelm.manifest import Manifest
from edgelm.targets import load_target

# Licences as hubs write them -> SPDX; another goes into the bill by its name.
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC-BY-4.0",
        "CC-BY-SA-4.0",
        "CC-BY-NC-4.0",
        "CC0-1.0",
        "GPL-3.0",
        "MPL-2.0",
        "LGPL-3.0",
        "AGPL-3.0",
        "ISC",
        "Unlicense",
    )
}
_TASKS = {
    "embedding": "sentence-similarity",
    "ner": "token-classification",
    "scoring": "text-classification",
}
# Runtime of a target -> its packages.
_RUNTIMES = {
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "polygraphy"),
    "none": (),
}


def write_sbom(folder: Path, manifest: Manifest) -> None:
    """Write a bundle's bill of materials.

    Args:
        folder: Holds every other file of the bundle.
        manifest: What it says; its ``files`` are not looked at.
    """
    digests = {
        path.name: file_digest(path)
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, SBOM, SIGNATURE)
    }
    text = json.dumps(
        bill(manifest, digests), indent=2, sort_keys=True, ensure_ascii=False
    )
    (folder / SBOM).write_text(text + "\n", encoding="utf-8")


def bill(manifest: Manifest, digests: Mapping[str, str]) -> dict[str, Any]:
    """What a bundle is made of.

    Args:
        manifest: The bundle's.
        digests: SHA-256 (hex) of its files by name, manifest and bill left out.

    Returns:
        A CycloneDX document; its serial number is derived from all the rest.
    """
    lineage = provenance.of_bundle(manifest)
    origin = lineage["origin"]
    original = {
        "type": "machine-learning-model",
        "bom-ref": "model:original",
        "name": origin["name"],
        "hashes": _hashes(origin["source_digest"]),
        **_licence(origin.get("licence")),
        **({"version": origin["revision"]} if "revision" in origin else {}),
    }
    files = [
        {
            "type": "data" if name.startswith("golden.") else "file",
            "bom-ref": f"file:{name}",
            "name": name,
            "hashes": _hashes(digest),
        }
        for name, digest in digests.items()
    ]
    data = _data(lineage)
    last = _last(lineage, "export").get("versions", {})
    runtime = (*_RUNTIMES[load_target(manifest.target).runtime], "tokenizers", "numpy")
    libraries = [
        _library("edgelm", manifest.created_by.removeprefix("edgelm ")),
        *(_library(name, last.get(name)) for name in runtime),
    ]
    made_of = [original, *files, *data, *libraries]
    bundle = {
        "type": "machine-learning-model",
        "bom-ref": "bundle",
        "name": f"{manifest.model.name} for {manifest.target} in {manifest.precision}",
        **_licence(origin.get("licence")),
        "pedigree": {"ancestors": [{**original, "bom-ref": "model:ancestor"}]},
        "modelCard": _card(manifest, data),
        "properties": [
            {
                "name": f"edgelm:step:{i}",
                "value": json.dumps(step, sort_keys=True, ensure_ascii=False),
            }
            for i, step in enumerate(lineage["steps"], 1)
        ],
    }
    body = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": bundle,
            "tools": {"components": _tools(lineage)},
        },
        "components": made_of,
        "dependencies": [
            {"ref": "bundle", "dependsOn": [part["bom-ref"] for part in made_of]}
        ],
    }
    text = json.dumps(body, sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:sha256:{digest}")
    return {**body, "serialNumber": f"urn:uuid:{serial}"}


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _licence(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    known = _SPDX.get(name.lower())
    return {"licenses": [{"license": {"id": known} if known else {"name": name}}]}


def _last(lineage: Mapping[str, Any], action: str) -> Mapping[str, Any]:
    found = [step for step in lineage["steps"] if step["action"] == action]
    return found[-1] if found else {}


def _library(name: str, version: str | None) -> dict[str, Any]:
    """A package; one that the device brings (TensorRT) has no version here."""
    if version is None:
        return {"type": "library", "bom-ref": f"library:{name}", "name": name}
    return {
        "type": "library",
        "bom-ref": f"library:{name}",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}",
    }


def _tools(lineage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What every step was done with, each version once."""
    used = {
        (name, version): _library(name, version)
        for step in lineage["steps"]
        for name, version in (
            ("edgelm", str(step.get("by", "")).removeprefix("edgelm ") or None),
            *step.get("versions", {}).items(),
        )
        if version is not None
    }
    for (name, version), tool in used.items():
        tool["bom-ref"] = f"tool:{name}@{version}"
        if name == "python":
            tool.update(type="application")
            del tool["purl"]
    return list(used.values())


def _data(lineage: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The texts that each step looked at."""
    found = []
    for i, step in enumerate(lineage["steps"], 1):
        about = step.get("calibration", {})
        digest = about.get("digest") or step.get("head", {}).get("data_digest")
        if digest:
            texts = about.get("texts", "labelled examples")
            found.append(
                {
                    "type": "data",
                    "bom-ref": f"data:{i}",
                    "name": f"{texts}, for the step {step['action']}",
                    "hashes": _hashes(digest),
                    "data": [{"type": "dataset", "name": texts}],
                }
            )
    return found


def _tasks(manifest: Manifest) -> list[str]:
    return [head.task for head in manifest.heads.values()] or [manifest.task]


def _card(manifest: Manifest, data: list[dict[str, Any]]) -> dict[str, Any]:
    golden = manifest.golden
    return {
        "modelParameters": {
            "task": ", ".join(sorted({_TASKS[task] for task in _tasks(manifest)})),
            "architectureFamily": "transformer",
            "modelArchitecture": manifest.model.architecture,
            "datasets": [{"ref": one["bom-ref"]} for one in data],
            "inputs": [
                {"format": f"{t.name} {t.dtype}"} for t in manifest.graph.inputs
            ],
            "outputs": [
                {"format": f"{t.name} {t.dtype}"} for t in manifest.graph.outputs
            ],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {
                    "type": "signal-to-noise ratio to the original model, dB",
                    "value": str(golden.measured_snr_db),
                    "slice": f"{golden.count} golden examples",
                }
            ]
        },
    }
