"""The shipped adapters: what they hold, what they merge to, what they find."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from edgelm import adapters, samples
from edgelm.adapters import adapter_path, load_merged, merge_, read_metadata
from edgelm.errors import ModelError
from edgelm.evaluate import accuracy
from edgelm.evaluate.reference import open_reference
from edgelm.models import BUILT_IN, load_model, locate
from edgelm.runtimes import EntityRecognizer, Scorer

NAMES = [name for name in BUILT_IN if BUILT_IN[name]]


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_small_and_says_where_it_comes_from(name: str) -> None:
    path = adapter_path(name)
    assert path.stat().st_size <= 3_000_000
    about = read_metadata(path)
    assert about["format_version"] == adapters.FORMAT_VERSION
    assert "CC BY" in about["data"]
    assert isinstance(about["seed"], int)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_the_base_and_the_product(name: str) -> None:
    """Against numpy, every weight of the model."""
    base = load_file(locate("minilm") / "model.safetensors")
    parts = load_file(adapter_path(name))
    scale = read_metadata(adapter_path(name))["scale"]
    adapted = 0
    for key, weight in load_model(name).model.named_parameters():
        bare = key.removeprefix("bert.")
        module = key.removesuffix(".weight")
        if f"{module}.lora_A" in parts:
            down, up = (
                parts[f"{module}.lora_{x}"].astype(np.float32) for x in ("A", "B")
            )
            due = base[bare] + scale * up @ down
            adapted += 1
        elif key in parts:
            due = parts[key].astype(np.float32)  # the head
        else:
            due = base[bare]
        assert np.allclose(weight.detach().numpy(), due, atol=1e-5), key
    assert adapted == sum(key.endswith(".lora_A") for key in parts)


def test_entities_of_plain_sentences() -> None:
    model = open_reference("minilm-ner")
    assert isinstance(model, EntityRecognizer)
    (found,) = model.extract(
        ["Maria Silva flew from Lisbon to Toronto to meet engineers of Siemens."]
    )
    assert [(e.text, e.label) for e in found] == [
        ("Maria Silva", "PER"),
        ("Lisbon", "LOC"),
        ("Toronto", "LOC"),
        ("Siemens", "ORG"),
    ]


def test_like_pairs_score_higher_than_unlike_ones() -> None:
    model = open_reference("minilm-similarity")
    assert isinstance(model, Scorer)
    alike, related, unlike = model.score(
        [
            ("A man is playing a flute.", "A man plays the flute."),
            ("A man is playing a flute.", "A woman is playing the violin."),
            ("A man is playing a flute.", "The bank raised its interest rate."),
        ]
    )
    assert 1 >= alike > 0.7 > related > unlike >= 0
    assert unlike < 0.2


def test_quality_on_the_built_in_samples() -> None:
    """Far under what they reach; a wrong merge or a wrong order of labels is near zero."""
    for name, least in (("minilm-ner", 60), ("minilm-similarity", 70)):
        model = open_reference(name)
        for data in accuracy.built_in(model):
            assert next(iter(accuracy.evaluate(model, data).values())) > least
    assert samples.ner()


def test_other_base_weights_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(locate("minilm"), base)
    path = base / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ModelError, match="trained over other weights"):
        load_merged(base, NAMES[0])


def test_files_that_are_no_adapter_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="not an adapter"):
        read_metadata(path)
    with safe_open(adapter_path(NAMES[0]), "pt") as file:
        about = json.loads(file.metadata()["edgelm_adapter"])
    newer = json.dumps({**about, "format_version": 2})
    save_file({"x": torch.zeros(1)}, path, {"edgelm_adapter": newer})
    with pytest.raises(ModelError, match="newer edgelm"):
        read_metadata(path)


def test_a_weight_that_the_model_lacks_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"adapts nothing\.weight"):
        merge_(
            torch.nn.Linear(2, 2),
            {"nothing.lora_A": torch.zeros(1, 2), "nothing.lora_B": torch.zeros(2, 1)},
            1.0,
        )


def test_a_built_in_model_has_one_task() -> None:
    with pytest.raises(ModelError, match="for the task ner, not scoring"):
        load_model("minilm-ner", "scoring")


def test_the_source_digest_tells_adapters_apart() -> None:
    digests = {load_model(name).source_digest for name in BUILT_IN}
    assert len(digests) == len(BUILT_IN)
