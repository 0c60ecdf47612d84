"""Several heads on one encoder: each says what it says alone, and the graph runs once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from click.testing import CliRunner

import edgelm
from edgelm.bundle import open_bundle, seal
from edgelm.cli import cli
from edgelm.errors import BundleError, InputError
from edgelm.heads import fit, fit_heads
from edgelm.runtimes.sharing import close, share
from tests.conftest import WORDS, with_token_embeddings
from tests.runtimes.service.conftest import serving

Bundles = Callable[..., Path]
NAMES = {"anna": "PER", "peter": "PER", "paris": "LOC", "london": "LOC"}
TEXTS = [
    "the old man plays anna",
    "",
    "a flute is a new book .",
    "the river in paris , " * 20,
    "a garden",
    "peter is reading in London!",
]


def examples(count: int = 60) -> list[dict[str, Any]]:
    """Sentences with names; every second says that something is something."""
    draw, rows = np.random.default_rng(0), []
    words = [w for w in WORDS if w.isalpha() and w not in NAMES and w != "is"]
    for i in range(count):
        name = list(NAMES)[i % 4]
        middle = "is a" if i // 4 % 2 else "and the"
        text = (
            f"{' '.join(draw.choice(words, 2))} {name} {middle} {draw.choice(words)} ."
        )
        start = text.index(name)
        spans = [{"start": start, "end": start + len(name), "label": NAMES[name]}]
        rows.append({"text": text, "entities": spans, "label": " is " in text})
    return rows


def part(rows: list[dict[str, Any]], *fields: str) -> list[dict[str, Any]]:
    return [{field: row[field] for field in ("text", *fields)} for row in rows]


@pytest.fixture(scope="module")
def made(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Encoders, the two heads together, and each alone."""
    root = tmp_path_factory.mktemp("several")
    base = with_token_embeddings(bundles("embedding"), root / "base")
    fit_heads(base, examples(), root / "both", name="definition")
    fit(base, part(examples(), "label"), root / "definition")
    fit(base, part(examples(), "entities"), root / "entities")
    return root


@pytest.fixture(scope="module")
def ner_made(
    tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle of an ner model, and the same with a score beside its entities."""
    from edgelm.export import export
    from edgelm.models import load_model

    root = tmp_path_factory.mktemp("ner")
    model = load_model(str(tiny("ner")))
    export(model, "cpu", root / "ner", precision="fp32", token_embeddings=-1)
    rows = part(examples(), "label")
    fit_heads(root / "ner", rows, root / "both", name="definition")
    return root


def analyzer(path: Path) -> edgelm.Analyzer:
    model = edgelm.load(path)
    assert isinstance(model, edgelm.Analyzer)
    return model


def places(entities: Any) -> list[tuple[int, int, str]]:
    return [(e.start, e.end, e.label) for e in entities]


def check_answers(answers: list[dict[str, Any]], scores: Any, entities: Any) -> None:
    for answer, score, found in zip(answers, scores, entities, strict=True):
        assert answer["definition"] == pytest.approx(float(score), abs=1e-5)
        assert places(answer["entities"]) == places(found)
        due = [e.score for e in found]
        assert [e.score for e in answer["entities"]] == pytest.approx(due, abs=1e-5)


def test_each_head_says_what_it_says_in_a_bundle_of_its_own(made: Path) -> None:
    model = analyzer(made / "both")
    alone: Any = edgelm.load(made / "definition")
    recognizer: Any = edgelm.load(made / "entities")
    answers, cut = model.analyze_with_truncation(TEXTS)
    check_answers(answers, alone.score(TEXTS), recognizer.extract(TEXTS))
    assert cut.tolist() == alone.score_with_truncation(TEXTS)[1].tolist()
    assert cut.tolist() == [False, False, False, True, False, False]
    texts = [row["text"] for row in examples()]
    found = [answer["definition"] > 0.5 for answer in model.analyze(texts)]  # type: ignore[operator]
    assert np.mean(np.equal(found, [row["label"] for row in examples()])) > 0.9
    assert any(answer["entities"] for answer in answers)
    # The heads by themselves, and the encoder.
    np.testing.assert_allclose(
        model.heads["definition"].score(TEXTS), alone.score(TEXTS), atol=1e-5
    )  # type: ignore[union-attr]
    base: Any = edgelm.load(made / "base")
    assert model.embedder is not None
    for long_texts in ("truncate", "windows"):
        np.testing.assert_allclose(
            model.embedder.encode(TEXTS, long_texts=long_texts),
            base.encode(TEXTS, long_texts=long_texts),
            atol=1e-5,
        )


def test_a_score_beside_the_graphs_own_entities(ner_made: Path) -> None:
    """Its vectors are the means of tokens, padding left out."""
    model, plain = analyzer(ner_made / "both"), edgelm.load(ner_made / "ner")
    assert isinstance(plain, edgelm.EntityRecognizer)
    assert list(model.heads) == ["definition", "entities"]  # by name
    assert model.embedder is None
    head = model.heads["definition"].engine.head
    assert head is not None
    vectors = [
        plain.engine.run([encoding], "token_embeddings")[0].astype(float).mean(axis=0)
        for encoding in plain.engine.tokenize(TEXTS)
    ]
    logits = np.array(vectors) @ head.weight.astype(float) + head.bias
    answers = model.analyze(TEXTS)
    check_answers(answers, 1 / (1 + np.exp(-logits[:, 0])), plain.extract(TEXTS))
    done = CliRunner().invoke(cli, ["verify", str(ner_made / "both")])
    assert done.exit_code == 0, done.output
    assert (
        json.loads((ner_made / "both" / "manifest.json").read_text())["format_version"]
        == 3
    )


def test_the_graph_runs_once_for_all_heads(made: Path) -> None:
    """Counted by the queue's own measure: every window is computed once, and only what is asked for."""
    model = share(analyzer(made / "both"), max_batch_tokens=1)
    batches: list[Any] = []
    model.engine.batcher.observe = batches.append  # type: ignore[attr-defined]
    model.analyze(TEXTS)
    long = model.engine.tokenize([TEXTS[3]])[0]
    assert len(batches) == len(TEXTS) + len(long.overflowing)
    batches.clear()
    model.analyze(TEXTS, heads=["definition"])
    assert len(batches) == len(TEXTS)
    close(model)


def test_neighbours_and_callers_make_no_difference(made: Path) -> None:
    """Padding, common batches, and callers who want other outputs of the same batch."""
    whole = analyzer(made / "both")
    alone = [whole.analyze([text])[0] for text in TEXTS]
    scores = [answer["definition"] for answer in alone]
    entities = [answer["entities"] for answer in alone]
    check_answers(whole.analyze(TEXTS), scores, entities)
    shared = share(whole)
    asks: list[Callable[[], Any]] = [
        lambda: [a["definition"] for a in shared.analyze(TEXTS)],
        lambda: shared.heads["definition"].score(TEXTS).tolist(),  # type: ignore[union-attr]
        lambda: [places(e) for e in shared.heads["entities"].extract(TEXTS)],  # type: ignore[union-attr]
        lambda: shared.embedder.encode(TEXTS),  # type: ignore[union-attr]
    ]
    vectors = whole.embedder.encode(TEXTS)  # type: ignore[union-attr]
    dues: list[Any] = [scores, scores, [places(e) for e in entities], vectors]
    with ThreadPoolExecutor(8) as pool:
        for ask, due, found in [
            (ask, due, pool.submit(ask))
            for ask, due in zip(asks * 6, dues * 6, strict=True)
        ]:
            if ask is asks[2]:
                assert found.result() == due
            else:
                np.testing.assert_allclose(found.result(), due, atol=1e-5)
    close(shared)


def test_arguments_of_entities_reach_them(made: Path) -> None:
    model = analyzer(made / "both")
    recognizer = model.heads["entities"]
    assert isinstance(recognizer, edgelm.EntityRecognizer)
    words = [["anna", "is", "in", "paris"]]
    options: dict[str, Any] = {
        "units": "words",
        "strategy": "average",
        "thresholds": {"LOC": 0.2},
    }
    (answer,) = model.analyze(words, **options)
    assert answer["entities"] == recognizer.extract(words, **options)[0]
    assert model.analyze([]) == []
    with pytest.raises(
        InputError, match=r"has no head 'x'\. Its heads: definition, entities"
    ):
        model.analyze(["a"], heads=["x"])
    with pytest.raises(InputError, match="Units of words"):
        model.analyze(["a"], units="words")
    with pytest.raises(InputError, match="one string"):
        model.analyze("a")


def test_heads_are_added_one_after_another(made: Path, tmp_path: Path) -> None:
    """To a bundle with one head, and to one with two; the ones before stay as they are."""
    rows = part(examples(), "label")
    fit_heads(made / "entities", rows, tmp_path / "two", name="definition")
    two, both = analyzer(tmp_path / "two"), analyzer(made / "both")
    dues = both.analyze(TEXTS)
    check_answers(
        two.analyze(TEXTS),
        [a["definition"] for a in dues],
        [a["entities"] for a in dues],
    )
    lengths = [
        {"text": r["text"], "label": "long" if len(r["text"]) > 28 else "short"}
        for r in rows
    ]
    fit_heads(tmp_path / "two", lengths, tmp_path / "three", name="length")
    three = analyzer(tmp_path / "three").analyze(TEXTS)
    assert list(three[0]) == ["definition", "entities", "length"]
    assert [a["definition"] for a in three] == [
        a["definition"] for a in two.analyze(TEXTS)
    ]
    assert sum(three[0]["length"].values()) == pytest.approx(1)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("bundle", "fields", "name", "message"),
    [
        ("both", ("label",), None, "has the heads definition, entities already. Name the new one"),
        ("both", ("label",), "definition", "There is a head called definition already"),
        ("base", ("label",), "text", "cannot be called 'text'"),
        ("base", ("label",), "../x", "cannot be called"),
        ("base", ("entities", "label"), "entities", "the one of texts needs another"),
    ],
)  # fmt: skip
def test_names_that_cannot_be_are_refused(
    made: Path,
    tmp_path: Path,
    bundle: str,
    fields: tuple[str, ...],
    name: str | None,
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        fit_heads(made / bundle, part(examples(), *fields), tmp_path / "o", name=name)
    assert not (tmp_path / "o").exists()


def test_examples_and_encoders_that_cannot_be_are_refused(
    made: Path, bundles: Bundles, tmp_path: Path
) -> None:
    rows = examples()
    with pytest.raises(InputError, match="Example 3 has no field 'label'"):
        fit_heads(made / "base", [*rows[:2], part(rows, "entities")[2]], tmp_path / "o")
    same = [{**row, "label": True} for row in rows]
    with pytest.raises(InputError, match="All examples have the label True"):
        fit_heads(made / "base", same, tmp_path / "o")
    beyond = [{"text": "a man", "entities": [{"start": 3, "end": 9, "label": "X"}]}] * 9
    with pytest.raises(InputError, match="Example 1: the entity 3 to 9 covers no word"):
        fit_heads(made / "base", beyond, tmp_path / "o")
    nothing = [{"text": "a man", "entities": []}] * 9
    with pytest.raises(InputError, match="All words have the label O"):
        fit_heads(made / "base", nothing, tmp_path / "o")
    pairs = [
        {"text1": r["text"], "text2": "a", "score": float(i)}
        for i, r in enumerate(rows)
    ]
    with pytest.raises(InputError, match="would read pairs"):
        fit_heads(made / "base", pairs, tmp_path / "o", name="x")
    with pytest.raises(InputError, match="--token-embeddings last"):
        fit_heads(bundles("ner"), part(rows, "label"), tmp_path / "o", name="x")
    assert not list(tmp_path.iterdir())


def test_manifests_that_do_not_fit_are_refused(made: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    shutil.copytree(made / "both", tmp_path / "b")
    manifest = open_bundle(made / "both").manifest
    (tmp_path / "b" / "manifest.json").unlink()
    seal(tmp_path / "b", replace(manifest, heads={}))
    with pytest.raises(BundleError, match="does not say which heads"):
        edgelm.load(tmp_path / "b")
    first = manifest.heads["definition"]
    bare = replace(first, scoring=None)
    (tmp_path / "b" / "manifest.json").unlink()
    seal(
        tmp_path / "b", replace(manifest, heads={**manifest.heads, "definition": bare})
    )
    with pytest.raises(BundleError, match=r"definition of .* has no labels"):
        edgelm.load(tmp_path / "b")


def test_the_command_line_says_both(made: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lines = [json.dumps(row) for row in examples()]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    args = [
        str(made / "base"),
        "--data",
        str(data),
        "--name",
        "definition",
        "-o",
        str(tmp_path / "o"),
        "--json",
    ]
    done = CliRunner().invoke(cli, ["fit-head", *args])
    assert done.exit_code == 0, done.output
    reports = [json.loads(line) for line in done.stdout.strip().split("\n")]
    assert {r["head"]: r["features"] for r in reports} == {
        "entities": "token",
        "definition": "text",
    }
    done = CliRunner().invoke(
        cli, ["run", str(tmp_path / "o"), TEXTS[0], "--units", "utf-8"]
    )
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    (due,) = analyzer(made / "both").analyze([TEXTS[0]])
    assert row["definition"] == pytest.approx(due["definition"], abs=1e-5)
    assert [e["label"] for e in row["entities"]] == [e.label for e in due["entities"]]  # type: ignore[union-attr]
    assert row["truncated"] is False


def test_the_service_answers_by_one_route_and_by_each_heads(made: Path) -> None:
    """One process; a head is named after its bundle, and found without a name."""
    model = analyzer(made / "both")
    dues = model.analyze(TEXTS)
    with (
        serving(f"both={made / 'both'}") as server,
        httpx.Client(base_url=server.url) as client,
    ):

        def post(path: str, **body: Any) -> Any:
            reply = client.post(path, json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()

        found = post("/analyze", inputs=TEXTS)
        for answer, due in zip(found, dues, strict=True):
            assert answer["definition"] == pytest.approx(due["definition"], abs=1e-5)
            labels = [
                (e["start"], e["end"], e["entity_group"]) for e in answer["entities"]
            ]
            assert labels == places(due["entities"])
        assert post("/analyze", inputs=TEXTS[0], heads=["definition"]).keys() == {
            "definition"
        }
        assert post("/", inputs=TEXTS[0]).keys() == {"definition", "entities"}
        assert (
            post("/ner", inputs=TEXTS[5], model="both/entities") == found[5]["entities"]
        )
        assert post("/ner", inputs=TEXTS[5]) == found[5]["entities"]
        (one,) = post("/predict", inputs=TEXTS[0])
        assert one == {
            "label": "definition",
            "score": pytest.approx(found[0]["definition"], abs=1e-5),
        }
        vectors = post("/embed", inputs=TEXTS[:2], normalize=False)
        np.testing.assert_allclose(vectors, model.embedder.encode(TEXTS[:2]), atol=1e-5)  # type: ignore[union-attr]
        refused = client.post("/analyze", json={"inputs": "a", "heads": ["x"]})
        assert refused.status_code == 422
        assert "has no head 'x'" in refused.json()["error"]
        refused = client.post("/ner", json={"inputs": "a", "model": "both/definition"})
        assert refused.status_code == 422
        status = client.get("/status").json()["models"][0]
        assert status["heads"] == {
            "both/definition": "scoring",
            "both/entities": "ner",
            "both/embedding": "embedding",
        }
        assert client.get("/info").json()["model_type"]["classifier"]["id2label"] == {
            "0": "definition"
        }
        assert server.stop() == 0
