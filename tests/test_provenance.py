"""Where a bundle comes from, and what it is made of."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from edgelm import provenance, samples
from edgelm.bundle import SBOM, file_digest, open_bundle, seal
from edgelm.cli import cli
from edgelm.sbom import bill


def run(*args: object) -> Any:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


def check(document: str) -> dict[str, Any]:
    """Validate by the schema of CycloneDX itself, which refuses unknown keys."""
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(document)
    assert problem is None, problem
    return json.loads(document)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], Path]) -> Path:
    """A folder with a checkpoint of a checkpoint, and its bundle in int8."""
    root = tmp_path_factory.mktemp("made")
    model = shutil.copytree(tiny("embedding"), root / "model")
    (model / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    quick = ("--max-texts", "8", "--seed", "5")
    run("compress", model, "-o", root / "half", "--ffn-keep", "0.5", *quick)
    run("compress", root / "half", "-o", root / "small", "--sparsity", "2:4", *quick)
    texts = "\n".join(text.replace("\n", " ") for text in samples.calibration()[:40])
    (root / "texts.txt").write_text(texts, encoding="utf-8")
    export(root, root / "bundle")
    return root


def export(root: Path, bundle: Path) -> None:
    options = ("--target", "cpu", "--calibration", root / "texts.txt")
    run("export", root / "small", "-o", bundle, *options)


def test_the_chain_is_whole(made: Path) -> None:
    chain = json.loads(run("info", made / "bundle", "--json").stdout)["lineage"]
    weights = file_digest(made / "model" / "model.safetensors")
    assert chain["version"] == 1
    assert chain["origin"] == {
        "name": str(made / "model"),
        "architecture": "bert",
        "source_digest": weights,
        "licence": "mit",
    }
    first, second, exported = chain["steps"]
    assert [s["action"] for s in chain["steps"]] == ["compress", "compress", "export"]
    assert first["weights"] == file_digest(made / "half" / "model.safetensors")
    assert second["weights"] == file_digest(made / "small" / "model.safetensors")
    assert first["recipe"]["steps"][0]["keep"] == 0.5
    assert second["recipe"]["steps"][0]["sparsity"] == "2:4"
    assert first["calibration"]["seed"] == 5
    assert first["calibration"]["count"] == 8
    assert first["calibration"]["digest"] == second["calibration"]["digest"]
    assert exported["precision"] == "int8"
    assert exported["calibration"]["count"] == 40
    for step in chain["steps"]:
        assert step["by"].startswith("edgelm ")
        assert {"python", "torch", "transformers"} <= set(step["versions"])
        assert {"cpu", "arch", "cpus", "system"} == set(step["machine"])


@pytest.mark.parametrize("name", ["bundle", "small"])
def test_people_read_the_chain_too(made: Path, name: str) -> None:
    words = " ".join(run("info", made / name).stderr.split())
    places = [
        words.index(part) for part in ("original weights", "shrink (", "sparsify (")
    ]
    assert places == sorted(places)
    assert ("for cpu in int8" in words) == (name == "bundle")


def test_weights_changed_by_something_else_are_a_link_of_their_own(
    made: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from edgelm.models import load_model

    other = shutil.copytree(made / "small", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    name = next(iter(sorted(tensors)))
    tensors[name] = tensors[name] + 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    steps = provenance.lineage_of(load_model(str(other)))["steps"]
    assert [step["action"] for step in steps] == ["compress", "compress", "changed"]
    assert steps[-1]["weights"] == file_digest(other / "model.safetensors")


def test_an_old_checkpoint_and_an_old_bundle_say_what_they_know(
    made: Path, tmp_path: Path
) -> None:
    from edgelm.models import load_model

    old = shutil.copytree(made / "small", tmp_path / "old")
    about = json.loads((old / "edgelm.json").read_text(encoding="utf-8"))
    del about["lineage"]
    (old / "edgelm.json").write_text(json.dumps(about), encoding="utf-8")
    chain = provenance.lineage_of(load_model(str(old)))
    assert chain["origin"]["source_digest"] == about["model"]["source_digest"]
    assert "licence" not in chain["origin"]
    (step,) = chain["steps"]
    assert step["calibration"]["digest"] == about["calibration_digest"]
    assert "sparsify" in run("info", old).stderr

    bundle = shutil.copytree(made / "bundle", tmp_path / "bundle")
    manifest = open_bundle(bundle).manifest
    less = {k: v for k, v in manifest.provenance.items() if k != "lineage"}
    (bundle / SBOM).unlink()
    seal(bundle, replace(manifest, provenance=less))
    assert "for cpu in int8" in run("info", bundle).stderr
    check(json.dumps(bill(open_bundle(bundle).manifest, {})))


def test_the_bill_is_valid_and_names_every_file(made: Path) -> None:
    bundle = open_bundle(made / "bundle")
    document = check(bundle.file(SBOM).read_text(encoding="utf-8"))
    parts = {part["bom-ref"]: part for part in document["components"]}
    for name, info in bundle.manifest.files.items():
        if name != SBOM:
            (found,) = parts[f"file:{name}"]["hashes"]
            assert found == {"alg": "SHA-256", "content": info.sha256}
    origin = parts["model:original"]
    assert origin["licenses"] == [{"license": {"id": "MIT"}}]
    assert origin["hashes"][0]["content"] == bundle.manifest.model.source_digest
    chain = bundle.manifest.provenance["lineage"]["steps"]
    digests = [step["calibration"]["digest"] for step in chain]
    data = [p for ref, p in parts.items() if ref.startswith("data:")]
    assert [p["hashes"][0]["content"] for p in data] == digests
    for name in ("onnxruntime", "tokenizers", "numpy"):
        assert parts[f"library:{name}"]["version"] == chain[-1]["versions"][name]
    tools = {t["name"] for t in document["metadata"]["tools"]["components"]}
    assert {"edgelm", "torch", "onnx", "python"} <= tools
    (every,) = document["dependencies"]
    assert set(every["dependsOn"]) == set(parts)


def test_the_same_export_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "again")
    first, again = made / "bundle", tmp_path / "again"
    names = {path.name for path in first.iterdir()}
    assert names == {path.name for path in again.iterdir()}
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_the_serial_number_follows_the_content(made: Path) -> None:
    manifest = open_bundle(made / "bundle").manifest
    one = bill(manifest, {"model.onnx": "0" * 64})
    assert one == bill(manifest, {"model.onnx": "0" * 64})
    other = bill(manifest, {"model.onnx": "1" * 64})
    assert one["serialNumber"] != other["serialNumber"]


def test_an_unknown_licence_is_written_by_its_name(made: Path) -> None:
    manifest = open_bundle(made / "bundle").manifest
    lineage = manifest.provenance["lineage"]
    origin = {**lineage["origin"], "licence": "llama3.1", "revision": "0" * 40}
    changed = {**manifest.provenance, "lineage": {**lineage, "origin": origin}}
    document = check(json.dumps(bill(replace(manifest, provenance=changed), {})))
    part = document["components"][0]
    assert part["licenses"] == [{"license": {"name": "llama3.1"}}]
    assert part["version"] == "0" * 40


@pytest.mark.parametrize("target", ["cpu-openvino", "jetson-orin-nano"])
def test_other_targets_have_other_runtimes(made: Path, target: str) -> None:
    manifest = replace(open_bundle(made / "bundle").manifest, target=target)
    document = check(json.dumps(bill(manifest, {})))
    names = {p["name"] for p in document["components"] if p["type"] == "library"}
    due = {"cpu-openvino": {"openvino"}, "jetson-orin-nano": {"tensorrt", "polygraphy"}}
    assert names == due[target] | {"edgelm", "tokenizers", "numpy"}


def test_a_fitted_head_is_a_link_and_a_part(made: Path, tmp_path: Path) -> None:
    rows = [{"text": f"man {i} plays", "label": "ab"[i % 2]} for i in range(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    run("fit-head", made / "bundle", "--data", data, "-o", tmp_path / "own")
    bundle = open_bundle(tmp_path / "own")
    step = bundle.manifest.provenance["lineage"]["steps"][-1]
    assert step["action"] == "fit-head"
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert step["head"]["data_digest"] == digest
    document = check(bundle.file(SBOM).read_text(encoding="utf-8"))
    parts = {part["bom-ref"] for part in document["components"]}
    assert {"file:head.safetensors", "data:4"} <= parts
    assert "logistic head on 20 rows" in " ".join(
        run("info", tmp_path / "own").stderr.split()
    )
