"""Heads: against slow references, and from a file of examples to a bundle that runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.bundle import open_bundle
from edgelm.cli import cli
from edgelm.errors import BundleError, ConfigError, InputError
from edgelm.heads import fit
from edgelm.heads.fitting import HeadConfig, fit_head, folds, mean_loss
from edgelm.runtimes.heads import Head, load_head, pair_features, save_head
from tests.conftest import WORDS, with_token_embeddings

Bundles = Callable[..., Path]


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    words = [w for w in WORDS if w.isalpha()]
    return [" ".join(draw.choice(words, 6)) for _ in range(count)]


def standardised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    centre, scale = x.mean(axis=0), x.std(axis=0)
    return (x - centre) / scale, centre, scale


@pytest.mark.parametrize("shape", [(40, 7), (9, 20), (30, 1)])
@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_ridge_is_the_normal_equations(shape: tuple[int, int], penalty: float) -> None:
    random = np.random.default_rng(1)
    x = random.normal(2, 3, shape)
    y = random.normal(size=(shape[0], 2))
    found = fit_head(x, y, HeadConfig(penalties=(penalty,), folds=3))
    z, centre, scale = standardised(x)
    gram = z.T @ z + shape[0] * penalty * np.eye(shape[1])
    weight = np.linalg.solve(gram, z.T @ (y - y.mean(axis=0))) / scale[:, None]
    np.testing.assert_allclose(found.weight, weight, atol=1e-9)
    np.testing.assert_allclose(found.bias, y.mean(axis=0) - centre @ weight, atol=1e-9)


def test_linear_is_least_squares() -> None:
    random = np.random.default_rng(2)
    x = random.normal(size=(30, 4))
    x[:, 3] = 5  # a constant says nothing, and must not divide by 0
    y = random.normal(size=(30, 1))
    found = fit_head(x, y, HeadConfig("linear"))
    due = np.linalg.lstsq(np.c_[x[:, :3], np.ones(30)], y, rcond=None)[0]
    np.testing.assert_allclose(
        x @ found.weight + found.bias, np.c_[x[:, :3], np.ones(30)] @ due
    )
    assert found.penalty == 0.0


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("intercept", [True, False])
def test_logistic_is_a_least(loss: Any, intercept: bool) -> None:
    """No step in any direction makes the objective less: by finite differences."""
    random = np.random.default_rng(3)
    x, outputs = random.normal(1, 2, (50, 3)), 3
    y = np.eye(outputs)[random.integers(0, outputs, 50)]
    config = HeadConfig("logistic", penalties=(0.1,), folds=2)
    found = fit_head(x, y, config, loss=loss, intercept=intercept)
    centre = x.mean(axis=0) if intercept else np.zeros(3)
    scale = np.sqrt(np.mean((x - centre) ** 2, axis=0))

    def objective(weight: np.ndarray, bias: np.ndarray) -> float:
        penalty = 0.05 * float(((weight * scale[:, None]) ** 2).sum())
        return mean_loss(x @ weight + bias, y, loss) + penalty

    least = objective(found.weight, found.bias)
    for _ in range(60):
        step = random.normal(size=(4, outputs)) * 1e-2
        bias = step[3] if intercept else np.zeros(outputs)
        assert objective(found.weight + step[:3], found.bias + bias) > least - 1e-7
    if not intercept:
        assert not found.bias.any()


def test_losses_are_those_of_the_definition() -> None:
    logits = np.array([[0.3, -1.0], [700.0, -700.0]])
    targets = np.array([[1.0, 0.0], [0.0, 1.0]])
    p = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert mean_loss(logits[:1], targets[:1], "softmax") == pytest.approx(-np.log(p[0]))
    assert mean_loss(logits[1:], targets[1:], "softmax") == pytest.approx(1400)
    q = 1 / (1 + np.exp(-logits[0]))
    due = -np.log(q[0]) - np.log(1 - q[1])
    assert mean_loss(logits[:1], targets[:1], "sigmoid") == pytest.approx(due)


def test_the_penalty_is_the_one_that_generalises() -> None:
    """Noise needs a strong penalty, a clean line a weak one."""
    random = np.random.default_rng(4)
    x = random.normal(size=(40, 30))
    noise = fit_head(x, random.normal(size=(40, 1)), HeadConfig())
    clean = fit_head(x, x[:, :1], HeadConfig())
    assert noise.penalty > 1 > clean.penalty
    assert clean.losses[clean.penalty] == min(clean.losses.values())
    assert mean_loss(clean.held_out, x[:, :1], "squared") == clean.losses[clean.penalty]


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.sampled_from("abcdefghij"), min_size=3, max_size=60),
    count=st.integers(2, 3),
)
def test_folds_never_split_a_group(names: list[str], count: int) -> None:
    if len(set(names)) < count:
        with pytest.raises(
            InputError, match=f"{count} folds need at least {count} groups"
        ):
            folds(len(names), count, 0, names)
        return
    parts = folds(len(names), count, 0, names)
    assert set(parts.tolist()) == set(range(count))
    for name in set(names):
        assert len({p for p, n in zip(parts, names, strict=True) if n == name}) == 1


def test_features_of_pairs() -> None:
    u, v = np.array([[1.0, -2.0]], np.float32), np.array([[3.0, 4.0]], np.float32)
    assert pair_features(u, v, "pair").tolist() == [[2, 6, 3, -8]]
    assert pair_features(v, u, "pair").tolist() == [[2, 6, 3, -8]]
    assert pair_features(u, v, "ordered-pair").tolist() == [[1, -2, 3, 4, 2, 6, 3, -8]]


def test_a_head_survives_its_file(tmp_path: Path) -> None:
    head = Head("text", np.ones((3, 2), np.float32), np.zeros(2, np.float32))
    save_head(head, tmp_path / "h")
    again = load_head(tmp_path / "h", "text")
    assert np.array_equal(again.weight, head.weight)
    assert np.array_equal(again.bias, head.bias)
    save_head(Head("text", np.full((3, 2), np.nan), np.zeros(2)), tmp_path / "nan")  # type: ignore[arg-type]
    with pytest.raises(BundleError, match="not finite"):
        load_head(tmp_path / "nan", "text")
    (tmp_path / "h").write_bytes(b"no head")
    with pytest.raises(BundleError, match="cannot be read"):
        load_head(tmp_path / "h", "text")


def scorer(path: Path) -> edgelm.Scorer:
    model = edgelm.load(path)
    assert isinstance(model, edgelm.Scorer)
    return model


def test_scores_of_texts(bundles: Bundles, tmp_path: Path) -> None:
    """A score that is a linear function of the vector is found again."""
    texts = sentences(80)
    embedder = edgelm.load(bundles("embedding"))
    assert isinstance(embedder, edgelm.Embedder)
    line = np.random.default_rng(0).normal(size=embedder.dimension)
    due = embedder.encode(texts) @ line
    rows = [{"text": t, "score": float(s)} for t, s in zip(texts, due, strict=True)]
    report = fit(bundles("embedding"), rows, tmp_path / "out")
    assert report.measures["r2"] > 0.95
    model = scorer(tmp_path / "out")
    assert np.corrcoef(model.score(texts), due)[0, 1] > 0.99
    assert model.range == (due.min(), due.max())
    raw = model.score(sentences(300, 9), activation="none")
    within = model.score(sentences(300, 9))
    assert raw.max() > within.max() == np.float32(due.max())
    np.testing.assert_array_equal(
        within, np.clip(raw, due.min(), due.max()).astype(np.float32)
    )
    result = CliRunner().invoke(cli, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert data["format_version"] == 2
    assert (
        json.loads((bundles("embedding") / "manifest.json").read_text())[
            "format_version"
        ]
        == 1
    )


def test_classes_of_texts_and_several_labels(bundles: Bundles, tmp_path: Path) -> None:
    texts = [
        f"{noun} {noun} {noun} {rest[:12]}"
        for rest in sentences(30)
        for noun in ("paris", "flute")
    ]
    one = [
        {"text": t, "label": "place" if "paris" in t.split()[0] else "thing"}
        for t in texts
    ]
    report = fit(bundles("embedding"), one, tmp_path / "one")
    assert report.kind == "logistic"
    assert report.measures["accuracy"] > 0.8 > report.baseline["accuracy"]
    model = scorer(tmp_path / "one")
    assert model.labels == ("place", "thing")
    found = [best[0].label for best in model.classify(texts, top_k=1)]
    assert np.mean(np.equal(found, [row["label"] for row in one])) > 0.9
    scores = model.score(texts[:3])
    np.testing.assert_allclose(scores.sum(axis=1), 1, rtol=1e-5)
    several = [{"text": r["text"], "labels": [r["label"], "any"]} for r in one]
    fit(bundles("embedding"), several, tmp_path / "several")
    model = scorer(tmp_path / "several")
    found = model.classify(["paris the man"], threshold=0.5)[0]
    assert {label.label for label in found} >= {"any"}
    assert [label.score for label in found] == sorted(
        (x.score for x in found), reverse=True
    )


def test_pairs_see_their_order_only_where_they_should(
    bundles: Bundles, tmp_path: Path
) -> None:
    first, second = sentences(60, 1), sentences(60, 2)
    draw = np.random.default_rng(0).normal(size=60)
    rows = [
        {"text1": a, "text2": b, "score": float(s)}
        for a, b, s in zip(first, second, draw, strict=True)
    ]
    fit(bundles("embedding"), rows, tmp_path / "score")
    model = scorer(tmp_path / "score")
    assert model.takes_pairs
    pairs = list(zip(first, second, strict=True))
    turned = [(b, a) for a, b in pairs]
    np.testing.assert_allclose(model.score(pairs), model.score(turned), atol=1e-5)
    ranked = model.rerank(first[0], second, top_k=3)
    scores = model.score([(first[0], t) for t in second])
    assert [r.index for r in ranked] == np.argsort(-scores, kind="stable")[:3].tolist()
    labelled = [
        {"text1": a, "text2": b, "label": i % 2} for i, (a, b) in enumerate(pairs)
    ]
    fit(bundles("embedding"), labelled, tmp_path / "label")
    model = scorer(tmp_path / "label")
    assert model.labels == ("0", "1")
    assert np.abs(model.score(pairs) - model.score(turned)).max() > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_comparisons_are_antisymmetric_and_transitive(
    bundles: Bundles, tmp_path: Path, precision: str
) -> None:
    texts = sentences(40)
    worth = {t: t.count("a") for t in texts}
    rows = [
        {"text1": a, "text2": b, "score": float(np.sign(worth[a] - worth[b]))}
        for a, b in zip(texts, texts[7:] + texts[:7], strict=True)
    ]
    fit(bundles("embedding", precision), rows, tmp_path / "out", compare=True)
    model = scorer(tmp_path / "out")
    pairs = [(a, b) for a in texts[:9] for b in texts[:9]]
    margins = model.compare(pairs)
    turned = model.compare([(b, a) for a, b in pairs])
    np.testing.assert_array_equal(margins, -turned)
    table = margins.reshape(9, 9)
    assert not np.diag(table).any()
    np.testing.assert_allclose(table[0, 1] + table[1, 2], table[0, 2], atol=1e-5)
    with pytest.raises(InputError, match="does not rank"):
        model.rerank("a", ["b"])
    assert model.compare([]).shape == (0,)


def test_tags_of_words_give_a_recognizer(bundles: Bundles, tmp_path: Path) -> None:
    """On the vectors of tokens; windows, strategies and offsets as of any other."""
    base = with_token_embeddings(bundles("embedding"), tmp_path / "base")
    names = {"anna": "B-PER", "peter": "B-PER", "paris": "B-LOC", "london": "B-LOC"}
    rows = []
    for text, name in zip(sentences(120), list(names) * 30, strict=True):
        words = [*text.split()[:3], name, "old", "reading"]
        rows.append({"tokens": words, "tags": [names.get(w, "O") for w in words]})
    report = fit(base, rows, tmp_path / "ner")
    assert report.measures["accuracy"] > 0.95 > report.baseline["accuracy"]
    model = edgelm.load(tmp_path / "ner")
    assert isinstance(model, edgelm.EntityRecognizer)
    text = "the old man plays anna . " + "the river , " * 40 + "in London!"
    found = model.extract([text])[0]
    assert {(e.text, e.label) for e in found} >= {("anna", "PER"), ("London", "LOC")}
    with pytest.raises(
        BundleError, match=r"no output token_embeddings; it has sentence_embedding"
    ):
        fit(bundles("embedding"), rows, tmp_path / "x")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "no examples"),
        ([{"text": "a"}], {}, "have the fields text. Give text"),
        ([{"text": "a", "score": "b"}], {}, "Example 1: 'score' must be a number"),
        ([{"text": "a", "score": 1.0}, {"text": "b"}], {}, "Example 2 has no field 'score'"),
        ([{"text": "a", "label": "x"}] * 9, {}, "All examples have the label x"),
        ([{"text": "a", "score": 1.0}] * 9, {"kind": "logistic"}, "have scores, which need the kind ridge or linear"),
        ([{"text": "a", "score": 1.0}] * 2, {}, "5 folds need at least 5 rows; there are 2"),
        ([{"text": "a", "score": 1.0}], {"compare": True}, "Comparisons need"),
        ([{"text": "a", "score": 1.0}] * 9, {"group": "topic"}, "Example 1 has no field 'topic'"),
        ([{"text": "a", "labels": "x"}] * 9, {}, "'labels' must be a list"),
        ([{"tokens": ["a"], "tags": []}] * 9, {}, "(not as many tags|no output token_embeddings)"),
    ],
)  # fmt: skip
def test_examples_that_cannot_be_used_are_refused(
    bundles: Bundles, tmp_path: Path, rows: Sequence[Any], options: Any, message: str
) -> None:
    with pytest.raises((InputError, BundleError), match=message):
        fit(bundles("embedding"), rows, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_configs_are_checked() -> None:
    with pytest.raises(ConfigError, match="'kind' of a head must be one of"):
        HeadConfig("svm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 2"):
        HeadConfig(folds=1)
    with pytest.raises(ConfigError, match="above 0"):
        HeadConfig(penalties=(0.0,))


def test_the_command_loads_no_torch(bundles: Bundles, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"text": t, "label": i % 2} for i, t in enumerate(sentences(20))]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    code = (
        "import sys; from edgelm.cli import cli\n"
        "cli(['fit-head', *sys.argv[1:]], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    )
    args = [
        str(bundles("embedding")),
        "--data",
        str(data),
        "-o",
        str(tmp_path / "o"),
        "--json",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["kind"] == "logistic"
    assert report["rows"] == 20
    assert open_bundle(tmp_path / "o").manifest.head is not None
    again = CliRunner().invoke(cli, ["fit-head", *args])
    assert again.exit_code == 1
    assert "exists already" in again.output
