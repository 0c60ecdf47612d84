"""Embedding against sentence-transformers, scoring against torch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertForSequenceClassification

import edgelm
from edgelm import samples
from edgelm.errors import InputError
from edgelm.metrics import cosine
from edgelm.models import load_model
from edgelm.runtimes.scoring import activate
from tests.conftest import export_bundle, save_tiny, tiny_config

Bundles = Callable[..., Path]
STRANGE = [
    "",
    " ",
    "\n\t",
    "a",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈",
    "東京は夜の七時",
    "مرحبا بالعالم",
    "שלום עולם",
    "e\u0301 vs é vs ﬁ",
    "x\u0000y\ufffdz",
    "[SEP] [CLS] [MASK] ##ing",
    "word " * 10_000,
    "l" * 5_000,
    "MiXeD CaSe ÄÖÜ",
]


def embedder(path: Path, **options: Any) -> edgelm.Embedder:
    model = edgelm.load(path, **options)
    assert isinstance(model, edgelm.Embedder)
    return model


def scorer(path: Path) -> edgelm.Scorer:
    model = edgelm.load(path)
    assert isinstance(model, edgelm.Scorer)
    return model


def test_fp32_vectors_are_those_of_sentence_transformers(bundles: Bundles) -> None:
    from sentence_transformers import SentenceTransformer

    texts = samples.calibration()[::19] + STRANGE
    theirs = SentenceTransformer(str(load_model("minilm").folder), device="cpu")
    due = theirs.encode(texts, show_progress_bar=False)
    found = embedder(bundles("minilm")).encode(texts)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, due, atol=1e-5)


def test_int8_vectors_stay_near(bundles: Bundles) -> None:
    texts = samples.calibration()[::19]
    near = cosine(
        embedder(bundles("minilm")).encode(texts),
        embedder(bundles("minilm", "int8")).encode(texts),
    )
    assert near.mean() > 0.985
    assert near.min() > 0.94


def test_truncation_is_told(bundles: Bundles) -> None:
    model = embedder(bundles("embedding"))
    _, cut = model.encode_with_truncation(["the man", "the man " * 50, ""])
    assert cut.tolist() == [False, True, False]


def test_prompts_are_put_before_the_text(tiny_embedding: Path, tmp_path: Path) -> None:
    prompts = {"query": "the new ", "passage": "an old "}
    about = {"prompts": prompts, "default_prompt_name": "passage"}
    (tiny_embedding / "config_sentence_transformers.json").write_text(
        json.dumps(about), encoding="utf-8"
    )
    model = embedder(
        export_bundle(str(tiny_embedding), tmp_path / "b", precision="fp32")
    )
    assert model.prompts == prompts
    plain = ["the new book", "an old book"]
    without = embedder(strip_default(tmp_path / "b", tmp_path / "plain")).encode(plain)
    np.testing.assert_allclose(
        model.encode(["book"], prompt="query"), without[:1], atol=1e-6
    )
    np.testing.assert_allclose(model.encode(["book"]), without[1:], atol=1e-6)
    with pytest.raises(
        InputError, match=r"no prompt 'other'\. Its prompts: passage, query"
    ):
        model.encode(["book"], prompt="other")


def strip_default(bundle: Path, to: Path) -> Path:
    """The same bundle without a default prompt."""
    from dataclasses import replace

    from edgelm.bundle import MANIFEST, open_bundle, seal

    shutil.copytree(bundle, to)
    manifest = open_bundle(to).manifest
    (to / MANIFEST).unlink()
    assert manifest.embedding is not None
    seal(
        to,
        replace(manifest, embedding=replace(manifest.embedding, default_prompt=None)),
    )
    return to


def test_pair_scores_are_torchs(bundles: Bundles, tiny: Any) -> None:
    loaded = load_model(str(tiny("scorer")))
    pairs = [
        ("the man plays", "the woman sings"),
        ("paris", ""),
        ("", ""),
        ("flute " * 60, "book"),
    ]
    tokens = loaded.tokenizer(
        [a for a, _ in pairs],
        [b for _, b in pairs],
        truncation=True,
        max_length=32,
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        due = loaded.model(**tokens).logits[:, 0].sigmoid().numpy()
    model = scorer(bundles("scorer"))
    scores, cut = model.score_with_truncation(pairs)
    np.testing.assert_allclose(scores, due, atol=1e-6)
    assert cut.tolist() == [False, False, False, True]
    assert model.score([]).shape == (0,)


def test_several_labels_give_several_scores(tmp_path: Path) -> None:
    labels = {0: "sport", 1: "music", 2: "news"}
    model = BertForSequenceClassification(tiny_config(id2label=labels))
    folder = save_tiny(tmp_path / "m", model)
    classifier = scorer(export_bundle(str(folder), tmp_path / "b", precision="fp32"))
    assert classifier.labels == ("sport", "music", "news")
    scores = classifier.score(["the man plays", "the river"])
    assert scores.shape == (2, 3)
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    with pytest.raises(InputError, match=r"Text 0 must be a string. Got tuple"):
        classifier.score([("a", "b")])


@pytest.mark.parametrize("inputs", [["one text"], [("a", "b", "c")], [("a",)], [3]])
def test_what_is_no_pair_is_refused(bundles: Bundles, inputs: Any) -> None:
    with pytest.raises(InputError, match="Input 0 must be a pair of texts"):
        scorer(bundles("scorer")).score(inputs)


def test_activations() -> None:
    logits = np.array([[0.0, 1000.0], [-1000.0, 2.0]], np.float32)
    np.testing.assert_allclose(
        activate(logits, "sigmoid"), [[0.5, 1], [0, 0.880797]], atol=1e-6
    )
    np.testing.assert_allclose(activate(logits, "softmax"), [[0, 1], [0, 1]], atol=1e-6)
    assert activate(logits, "none") is logits
