"""Bundles: what is read is checked first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.bundle import FORMAT_VERSION, MANIFEST, _canonical, open_bundle
from edgelm.errors import BundleError, EdgelmError
from edgelm.golden import load_golden


def rewrite(bundle: Path, change: Any) -> None:
    """Change the manifest as a careful forger would, digest and all."""
    import hashlib

    data = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
    data.pop("digest")
    change(data)
    data["digest"] = hashlib.sha256(_canonical(data)).hexdigest()
    (bundle / MANIFEST).write_bytes(_canonical(data))


def test_round_trip(tiny_bundle: Path) -> None:
    bundle = open_bundle(tiny_bundle)
    assert bundle.manifest.task == "embedding"
    assert set(bundle.manifest.files) == {p.name for p in tiny_bundle.iterdir()} - {
        MANIFEST
    }
    assert bundle.size_bytes == sum(p.stat().st_size for p in tiny_bundle.iterdir())
    golden = load_golden(bundle)
    assert len(golden) == bundle.manifest.golden.count
    assert all(g.output.shape == (32,) and g.output.dtype == np.float32 for g in golden)
    assert {"", "naïve café, 東京 and Ελλάδα 🙂 e\u0301"} <= {g.text for g in golden}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    which=st.integers(0, 100),
    where=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
)
def test_any_changed_bit_in_any_file_is_noticed(
    tiny_bundle: Path, which: int, where: float, bit: int
) -> None:
    files = sorted(tiny_bundle.iterdir())
    path = files[which % len(files)]
    original = path.read_bytes()
    data = bytearray(original)
    data[int(where * len(data))] ^= 1 << bit
    path.write_bytes(bytes(data))
    try:
        with pytest.raises(BundleError):
            open_bundle(tiny_bundle)
    finally:
        path.write_bytes(original)
    open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    "name",
    ["model.onnx", "tokenizer.json", "golden.jsonl", "golden.safetensors", MANIFEST],
)
def test_a_truncated_or_missing_file_is_named(tiny_bundle: Path, name: str) -> None:
    path = tiny_bundle / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BundleError, match=name):
        open_bundle(tiny_bundle)
    path.unlink()
    with pytest.raises(BundleError, match=name):
        open_bundle(tiny_bundle)


def test_a_newer_format_is_refused_by_name_before_anything_else(
    tiny_bundle: Path,
) -> None:
    (tiny_bundle / "model.onnx").unlink()
    rewrite(tiny_bundle, lambda d: d.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(
        BundleError,
        match=f"bundle format {FORMAT_VERSION + 1}; this edgelm reads up to",
    ):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize("version", [0, -1, "1", True, None, 1.0])
def test_a_strange_version_is_refused(tiny_bundle: Path, version: Any) -> None:
    rewrite(tiny_bundle, lambda d: d.update(format_version=version))
    with pytest.raises(BundleError, match="format version"):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "a/b", "..", ".hidden", "a\\b", "", "a\nb"]
)
def test_a_file_name_that_leaves_the_folder_is_refused(
    tiny_bundle: Path, name: str
) -> None:
    rewrite(
        tiny_bundle,
        lambda d: d["files"].update({name: {"size": 1, "sha256": "0" * 64}}),
    )
    with pytest.raises(BundleError, match="not a plain name"):
        open_bundle(tiny_bundle)


def test_a_link_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.onnx"
    shutil.move(tiny_bundle / "model.onnx", outside)
    (tiny_bundle / "model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match="not a plain file"):
        open_bundle(tiny_bundle)


def test_unknown_keys_are_ignored_as_the_format_says(tiny_bundle: Path) -> None:
    rewrite(tiny_bundle, lambda d: d.update(future={"a": 1}))
    assert open_bundle(tiny_bundle).manifest.task == "embedding"


@pytest.mark.parametrize("key", ["task", "graph", "tokenizer", "golden", "files"])
def test_a_missing_or_wrong_key_is_named(tiny_bundle: Path, key: str) -> None:
    rewrite(tiny_bundle, lambda d: d.update({key: 7}))
    with pytest.raises(BundleError, match=key):
        open_bundle(tiny_bundle)


@pytest.mark.parametrize(
    "text", ["", "[]", "7", "{", "\x00", '{"format": "other"}', "[" * 100_000]
)
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(BundleError):
        open_bundle(tmp_path)


def test_what_is_no_bundle_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match="holds no manifest"):
        open_bundle(tmp_path)


def test_a_graph_that_is_none_is_one_sentence(tiny_bundle: Path) -> None:
    """A bundle can be whole and its graph still be no graph."""
    import hashlib

    junk = b"not a graph"
    (tiny_bundle / "model.onnx").write_bytes(junk)
    info = {"size": len(junk), "sha256": hashlib.sha256(junk).hexdigest()}
    rewrite(tiny_bundle, lambda d: d["files"].update({"model.onnx": info}))
    with pytest.raises(EdgelmError, match="cannot load"):
        edgelm.load(tiny_bundle)
