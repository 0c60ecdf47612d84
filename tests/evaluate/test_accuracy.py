"""The accuracy suite: data line by line, measures under resampling, and every kind of subject."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.errors import EdgelmError, GateError, InputError, SessionError
from edgelm.evaluate import measures
from edgelm.evaluate.accuracy import check_drop, evaluate, judge, load_dataset
from edgelm.evaluate.bootstrap import compare, draws, resample, statement
from edgelm.evaluate.data import Dataset
from edgelm.evaluate.examine import examine
from edgelm.evaluate.slices import disagreements, slices
from edgelm.evaluate.subjects import (
    Settings,
    Subject,
    of_model,
    open_subject,
    with_index,
)
from edgelm.metrics import entity_f1
from tests.conftest import save_tiny, tiny_tokenizer

Bundles = Callable[..., Path]
TEXTS = ("the man plays", "a woman in paris", "an old book", "new river city", "london")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- data ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text1": "a", "text2": "b", "score": NaN}', "line 3: the field 'score' is not a finite number"),
        ('{"text1": "a", "text2": "b", "score": "1"}', "line 3: the field 'score' is not a finite number"),
        ('{"text1": "a", "text2": 7, "score": 1}', "line 3: the field 'text2' is not a string"),
        ('{"text1": "a", "score": 1}', "line 3: there is no field 'text2'"),
        ('["a"]', "line 3: a JSON object is due, not list"),
        ('{"text1": "a", ', "line 3: not JSON"),
    ],
)  # fmt: skip
def test_a_malformed_line_is_named_by_its_number(
    tmp_path: Path, line: str, message: str
) -> None:
    """Empty lines count."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"text1": "a", "text2": "b", "score": 1}\n\n' + line + "\n", encoding="utf-8"
    )
    with pytest.raises(InputError, match=message):
        load_dataset(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "line 1: there are 2 tokens and 1 tags"),
        ({"text": "ab", "entities": [{"start": 1, "end": 3, "label": "X"}]}, "from 1 to 3 does not lie in the text"),
        ({"text": "ab", "entities": [{"start": "0", "end": 1, "label": "X"}]}, "'entities' is not a list of objects"),
        ({"text": "ab", "entities": [], "domain": 3}, "'domain' is not a string"),
    ],
)  # fmt: skip
def test_entities_are_checked(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_dataset(write(tmp_path / "x.jsonl", [row]))


CONLL = "-DOCSTART- -X- O O\n\n# a comment\nanna NNP I-NP {}\nof IN I-PP O\nnew NNP I-NP {}\nparis NNP I-NP {}\n\nx O\n"


@pytest.mark.parametrize(
    ("name", "tags"),
    [
        ("a.conll", ("S-PER", "B-LOC", "E-LOC")),
        ("a.txt", ("B-PER", "B-LOC", "I-LOC")),
        ("a.bio", ("U-PER", "B-LOC", "L-LOC")),
    ],
)
def test_conll_in_every_scheme(
    tmp_path: Path, name: str, tags: tuple[str, ...]
) -> None:
    path = tmp_path / name
    path.write_text(CONLL.format(*tags), encoding="utf-8")
    data = load_dataset(path)
    assert data.kind == "ner"
    assert data.rows == [
        {
            "text": "anna of new paris",
            "entities": [
                {"start": 0, "end": 4, "label": "PER"},
                {"start": 8, "end": 17, "label": "LOC"},
            ],
        },
        {"text": "x", "entities": []},
    ]
    path.write_text(
        "anna B-PER\nparis\n" if name != "a.txt" else "a O\n" * 30 + "paris\n"
    )
    with pytest.raises(InputError, match=r"line (2|31): a word and its tag are due"):
        load_dataset(path)


def test_kinds_by_fields(tmp_path: Path) -> None:
    rows = {
        "classification": {"text": "a", "label": "x"},
        "regression": {"text": "a", "score": 1},
        "similarity": {"text1": "a", "text2": "b", "label": 0.5},
        "language": {"text": "a"},
    }
    for kind, row in rows.items():
        data = load_dataset(write(tmp_path / "a.jsonl", [row]))
        assert (data.kind, len(data.digest)) == (kind, 64)
    (tmp_path / "a.txt").write_text("One line.\nAnother line.\n", encoding="utf-8")
    data = load_dataset(tmp_path / "a.txt")
    assert (data.kind, data.rows[0]["text"]) == ("language", "One line.\nAnother line.")


def beir(folder: Path, qrels: str | None = None) -> Path:
    (folder / "qrels").mkdir(parents=True)
    write(
        folder / "corpus.jsonl",
        [{"_id": f"d{i}", "text": t} for i, t in enumerate(TEXTS)],
    )
    write(
        folder / "queries.jsonl",
        [{"_id": f"q{i}", "text": t} for i, t in enumerate(TEXTS)],
    )
    lines = qrels or "".join(f"q{i}\td{i}\t1\n" for i in range(len(TEXTS)))
    (folder / "qrels" / "dev.tsv").write_text(f"query-id\tcorpus-id\tscore\n{lines}")
    return folder


def test_splits_of_beirs_layout(tmp_path: Path) -> None:
    folder = beir(tmp_path / "good")
    assert len(load_dataset(folder, "dev").rows) == 5
    with pytest.raises(
        InputError, match=r"no qrels/test.tsv. Splits that are there: dev"
    ):
        load_dataset(folder)
    with pytest.raises(InputError, match=r"dev.tsv, line 3: query, document and grade"):
        load_dataset(beir(tmp_path / "bad", "q0\td0\t1\nq1\td1\tyes\n"), "dev")
    with pytest.raises(InputError, match="holds no query with a relevant document"):
        load_dataset(beir(tmp_path / "empty", "unknown\td0\t1\n"), "dev")


# --- measures and the bootstrap -------------------------------------------------------


def repeated(values: list[Any], counts: np.ndarray) -> list[Any]:
    """What a draw means: each unit as often as it was drawn."""
    return [v for v, n in zip(values, counts, strict=True) for _ in range(int(n))]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(3, 40), levels=st.integers(2, 8))
def test_correlations_of_draws_are_scipys(seed: int, n: int, levels: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(seed)
    x, y = draw.integers(0, levels, n) / 3, draw.normal(size=n)
    counts = next(draws(n, 5, seed))
    found = {k: m(counts) for k, m in measures.correlations(x, y).items()}
    for i, row in enumerate(counts):
        a, b = repeated(list(x), row), repeated(list(y), row)
        if len(set(a)) < 2 or len(set(b)) < 2:
            assert np.isnan(found["spearman"][i])
            assert np.isnan(found["pearson"][i])
            continue
        assert found["spearman"][i] == pytest.approx(100 * stats.spearmanr(a, b)[0])
        assert found["pearson"][i] == pytest.approx(100 * stats.pearsonr(a, b)[0])


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 30))
def test_counts_of_draws_are_what_a_loop_counts(seed: int, n: int) -> None:
    draw = np.random.default_rng(seed)
    gold = [str(k) for k in draw.integers(0, 3, n)]
    said = [str(k) for k in draw.integers(0, 4, n)]
    sets = [
        [
            {(int(a), int(a) + 1, str(a % 2)) for a in draw.integers(0, 5, 2)}
            for _ in gold
        ]
        for _ in range(2)
    ]
    counts = next(draws(n, 4, seed))
    overall, by_class = measures.classes(gold, said)
    spans, by_type = measures.entities(*sets)
    for i, row in enumerate(counts):
        g, f = repeated(gold, row), repeated(said, row)
        each = {}
        for name in {*g, *f}:
            hits = sum(a == b == name for a, b in zip(g, f, strict=True))
            each[name] = 200 * hits / (g.count(name) + f.count(name))
            assert by_class[name](counts)[i] == pytest.approx(each[name])
        assert overall["macro-f1"](counts)[i] == pytest.approx(
            np.mean(list(each.values()))
        )
        assert overall["accuracy"](counts)[i] == pytest.approx(
            100 * np.mean([a == b for a, b in zip(g, f, strict=True)])
        )
        drawn = [repeated(one, row) for one in sets]
        expected = entity_f1(*drawn)
        for name in ("f1", "precision", "recall"):
            assert spans[name](counts)[i] == pytest.approx(100 * expected[name])
        kept = [[{s for s in spans if s[2] == "1"} for spans in one] for one in drawn]
        if "1" in by_type and any(map(len, kept[0] + kept[1])):
            expected = entity_f1(*kept)
            assert by_type["1"](counts)[i] == pytest.approx(100 * expected["f1"])


def test_means_over_units() -> None:
    counts = np.array([[1.0, 1, 1], [2, 0, 1], [0, 0, 3]])
    found = measures.mean([1.0, 2, 3])(counts)
    np.testing.assert_allclose(found, [2, 5 / 3, 3])
    found = measures.perplexity([2.0, 4, 9], [1, 4, 3])(counts)
    np.testing.assert_allclose(found, np.exp([15 / 8, 13 / 5, 3]))


def test_a_paired_comparison_sees_what_an_unpaired_one_cannot() -> None:
    """Each unit is a little worse; how hard units are differs much more."""
    hard = np.random.default_rng(0).normal(50, 20, 400)
    worse = measures.mean(hard - 1 + np.random.default_rng(1).normal(0, 2, 400))
    found = compare("ndcg@10", worse, measures.mean(hard), 400)
    assert found.significant
    assert found.interval[0] < -1 < found.interval[1] < 0
    assert found.p <= 0.002
    assert "significantly worse (difference -" in statement(found, "a", "b", "d")
    again = compare("ndcg@10", worse, measures.mean(hard), 400)
    other = compare("ndcg@10", worse, measures.mean(hard), 400, seed=1)
    assert again == found
    assert again.interval != other.interval
    lower = compare("perplexity", worse, measures.mean(hard), 400)
    assert "significantly better" in statement(lower, "a", "b", "d")
    alone = resample({"a": worse}, 400)["a"]
    assert np.ptp(np.quantile(alone, [0.025, 0.975])) > 5 * np.ptp(found.interval)
    # The standard error of a mean, by its formula.
    assert np.std(alone) == pytest.approx(np.std(hard) / 20, rel=0.1)


def test_equal_models_do_not_differ() -> None:
    values = measures.mean(np.random.default_rng(0).normal(size=50))
    found = compare("f1", values, values, 50)
    assert (found.difference, found.interval, found.p, found.significant) == (0, (0, 0), 1, False)  # fmt: skip
    assert "no significant difference" in statement(found, "a", "b", "d")


@pytest.mark.parametrize(
    ("before", "after", "name", "message"),
    [
        (20.0, 20.3, "perplexity on x", r"perplexity on x rose by 1\.50 %"),
        (80.0, math.nan, "f1 on x", "cannot be judged"),
        (0.0, -1.0, "spearman on x", "fell by inf"),
        (-10.0, -11.0, "spearman on x", r"fell by 10\.00 %"),
    ],
)
def test_gates_of_every_direction(
    before: float, after: float, name: str, message: str
) -> None:
    with pytest.raises(GateError, match=message):
        check_drop(before, after, 1.0, name)


# --- subjects ------------------------------------------------------------------------


def scoring(scores: list[float]) -> Subject:
    return Subject("s", "scoring", {}, ("score",), score=lambda x: np.array(scores))


def test_a_score_that_is_no_number_is_refused() -> None:
    rows = [{"text": t, "score": i} for i, t in enumerate("abc")]
    data = Dataset("d", "regression", rows)
    with pytest.raises(
        EdgelmError, match="no number for 1 of 3 inputs of d; the first is input 2"
    ):
        judge(scoring([0.1, math.nan, 0.2]), data)
    with pytest.raises(EdgelmError, match="spearman of s on d is not defined"):
        judge(scoring([0.1, 0.1, 0.1]), data)
    found = evaluate(scoring([1.0, 1.0, 4.0]), data)
    assert found["mae"] == pytest.approx(1.0)
    assert found["spearman"] == pytest.approx(100 * math.sqrt(3) / 2)


def test_classes_by_name_and_by_number() -> None:
    scores = np.array([[0.1, 0.7, 0.2], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4]], np.float32)
    subject = Subject(
        "s", "scoring", {}, ("no", "yes", "maybe"), score=lambda x: scores
    )
    rows = [{"text": "a", "label": y} for y in ("yes", 0, "maybe")]
    data = Dataset("d", "classification", rows)
    assert evaluate(subject, data) == {"accuracy": 100.0, "macro-f1": 100.0}
    strange = Dataset("d", "classification", [{"text": "a", "label": "spam"}] * 3)
    with pytest.raises(
        InputError,
        match="has the labels spam, which s does not know",
    ):
        judge(subject, strange)
    binary = Dataset(
        "d", "classification", [{"text": "a", "label": y} for y in (True, 0, 1)]
    )
    assert evaluate(scoring([0.9, 0.2, 0.4]), binary)["accuracy"] == pytest.approx(
        200 / 3
    )


def test_labels_that_the_model_lacks_are_told(bundles: Bundles) -> None:
    row = {"text": "anna in paris", "entities": [
        {"start": 0, "end": 4, "label": "PER"}, {"start": 8, "end": 13, "label": "enzyme"}]}  # fmt: skip
    (note,) = judge(edgelm.load(bundles("ner")), Dataset("d", "ner", [row])).notes
    assert "d has the entity types enzyme, which" in note
    assert "count as missed" in note


def test_slices_and_what_changed() -> None:
    rows = [
        {"text": "word " * (3 if i % 2 else 20), "score": float(i), "domain": "news" if i < 8 else "law"}
        for i in range(20)
    ]  # fmt: skip
    data = Dataset("d", "regression", rows)
    gold = np.arange(20.0)
    moved = gold.copy()
    moved[[3, 11]] += (30, -4)
    judged, other = judge(scoring(list(moved)), data), judge(scoring(list(gold)), data)
    found = {(s.by, s.name): s for s in slices(judged, other, resamples=200)}
    assert set(found) == {
        ("length", "up to 8 words"), ("length", "17 to 32 words"), ("domain", "law"), ("domain", "news")}  # fmt: skip
    even = found["length", "17 to 32 words"]
    assert (even.units, even.value, even.against) == (
        10,
        pytest.approx(100),
        pytest.approx(100),
    )
    news = judge(scoring(list(moved[:8])), Dataset("d", "regression", rows[:8]))
    assert found["domain", "news"].value == pytest.approx(news.values()["spearman"])
    assert (
        found["domain", "news"].value
        < 100
        == pytest.approx(found["domain", "news"].against)
    )
    first, second = disagreements(judged, other)
    assert (first.change, first.model, first.against, first.gold) == (30, 33, 3, 3)
    assert second.change == 4
    json.dumps(
        examine(scoring(list(moved)), [data], scoring(list(gold)), resamples=100)
    )


# --- language models ------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(n=st.integers(0, 60), size=st.integers(2, 20), data=st.data())
def test_windows_score_every_token_once_with_context(
    n: int, size: int, data: st.DataObject
) -> None:
    from edgelm.evaluate.perplexity import windows

    stride = data.draw(st.integers(1, size - 1))
    scored: list[int] = []
    for start, first, end in windows(n, size, stride):
        assert 0 <= start < first < end <= start + size
        assert first - start >= (1 if start == 0 else size - stride)
        scored += range(first, end)
    assert scored == list(range(1, n))


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": len(tiny_tokenizer()), "n_positions": 32}
    config = GPT2Config(
        n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **sizes
    )
    return save_tiny(tmp_path_factory.mktemp("lm") / "gpt", GPT2LMHeadModel(config))


def test_perplexity_is_what_a_loop_finds(language_model: Path, tmp_path: Path) -> None:
    from edgelm.evaluate.perplexity import windows
    from edgelm.models import load_model

    path = tmp_path / "text.txt"
    path.write_text("the man plays a flute in paris\n" * 12, encoding="utf-8")
    subject = open_subject(str(language_model), Settings(context=16, stride=6))
    found = evaluate(subject, load_dataset(path))
    loaded = load_model(str(language_model))
    text = path.read_text(encoding="utf-8").rstrip("\n")
    backend = loaded.tokenizer.backend_tokenizer
    ids = torch.tensor(backend.encode(text).ids)
    losses = []
    for start, first, end in windows(len(ids), 16, 6):
        for place in range(first, end):
            with torch.no_grad():
                logits = loaded.model(ids[None, start:place]).logits[0, -1]
            losses.append(-float(logits.log_softmax(-1)[ids[place]]))
    assert len(losses) == len(ids) - 1
    assert found == {"perplexity": pytest.approx(math.exp(np.mean(losses)), rel=1e-4)}
    (about,) = examine(subject, [load_dataset(path)], subject, resamples=100)[
        "datasets"
    ]
    assert about["comparisons"][0]["difference"] == 0
    whole = open_subject(str(language_model), Settings(context=32))
    with pytest.raises(InputError, match="different tokens or windows"):
        examine(subject, [load_dataset(path)], whole, resamples=100)
    with pytest.raises(InputError, match="stride must be from 1 to below the context"):
        evaluate(
            open_subject(str(language_model), Settings(context=8, stride=8)),
            load_dataset(path),
        )
    with pytest.raises(InputError, match="which a model for lm cannot use"):
        evaluate(subject, Dataset("d", "ner", [{"text": "a", "entities": []}]))


# --- servers and indexes --------------------------------------------------------------


@pytest.fixture(scope="module")
def server(bundles: Bundles) -> Iterator[str]:
    """All tiny bundles in one real server."""
    served = [f"{kind}={bundles(kind)}" for kind in ("embedding", "ner", "scorer")]
    command = [sys.executable, "-m", "edgelm", "serve", *served, "--port", "0"]
    command += ["--max-client-batch", "16"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ}
    ) as process:  # fmt: skip
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["url"]
        process.kill()


# No pair twice: rounding would break the tie.
PAIRS = [
    {"text1": a, "text2": b, "score": i + j / 3}
    for i, a in enumerate(TEXTS)
    for j, b in enumerate(TEXTS[:i])
]
NAMES = [{"text": f"anna in {t}", "entities": [{"start": 0, "end": 4, "label": "PER"}]} for t in TEXTS]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "address", "data"),
    [
        ("embedding", "", Dataset("pairs", "similarity", PAIRS)),
        ("embedding", "/v1", Dataset("pairs", "similarity", PAIRS)),
        ("scorer", "", Dataset("pairs", "similarity", PAIRS)),
        ("ner", "", Dataset("names", "ner", NAMES)),
    ],
)
def test_a_server_is_measured_as_its_bundle(
    server: str, bundles: Bundles, kind: str, address: str, data: Dataset
) -> None:
    seen: list[int] = []
    told = open_subject(
        f"{server}{address}#{kind}",
        progress=lambda what, done, total: seen.append(done),
    )
    found = judge(told, data)
    expected = judge(edgelm.load(bundles(kind)), data)
    assert found.values() == pytest.approx(expected.values(), abs=1e-3)
    assert seen[-1] == len(data.rows)
    assert (told.identity["kind"], told.identity["model"] is not None) == (
        "endpoint",
        True,
    )


def test_retrieval_from_a_server_and_from_an_index(
    server: str, bundles: Bundles, tmp_path: Path
) -> None:
    bundle, folder = str(bundles("embedding")), beir(tmp_path / "beir")
    data = load_dataset(folder, "dev")
    expected = evaluate(edgelm.load(bundle), data)
    assert expected["ndcg@10"] == 100
    assert evaluate(open_subject(f"{server}#embedding"), data) == expected
    command = [sys.executable, "-m", "edgelm", "index", "build", bundle]
    command += ["--vectors", "float16"]
    for name, source in (
        ("index", folder / "corpus.jsonl"),
        ("strange", tmp_path / "t.txt"),
    ):
        (tmp_path / "t.txt").write_text("london\nparis\n", encoding="utf-8")
        todo = [*command, str(source), "-o", str(tmp_path / name)]
        subprocess.run(todo, check=True, capture_output=True)
    subject = with_index(bundle, str(tmp_path / "index"))
    # An index ranks by dot products, and these vectors are not of length 1.
    vectors = edgelm.load(bundle).encode(list(TEXTS))  # type: ignore[union-attr]
    dots = vectors @ vectors.T
    places = 1 + (dots > dots.diagonal()[:, None]).sum(axis=1)
    ndcg = 100 * float(np.mean(1 / np.log2(places + 1)))
    assert ndcg < 100
    assert evaluate(subject, data)["ndcg@10"] == pytest.approx(ndcg)
    assert subject.identity["index"]["documents"] == 5
    with pytest.raises(InputError, match="is not among the documents of"):
        evaluate(with_index(bundle, str(tmp_path / "strange")), data)
    with pytest.raises(InputError, match="is no embedding bundle"):
        with_index("minilm", str(tmp_path / "index"))


def test_a_server_that_does_not_answer_is_one_sentence(server: str) -> None:
    with pytest.raises(
        SessionError, match=r"cannot be reached .* Is the server running\?"
    ):
        open_subject("http://127.0.0.1:9")
    with pytest.raises(SessionError, match="refuses"):
        open_subject(f"{server}#unknown")


def test_progress_of_a_bundle_counts_its_texts(bundles: Bundles) -> None:
    seen: list[tuple[int, int | None]] = []
    model = edgelm.load(bundles("embedding"))
    name = str(bundles("embedding"))
    subject = of_model(model, name, lambda what, *counts: seen.append(counts))
    evaluate(subject, Dataset("pairs", "similarity", PAIRS))
    assert seen[-1] == (len(PAIRS), len(PAIRS))
    assert subject.identity["kind"] == "bundle"
    assert len(subject.identity["digest"]) == 64


def test_two_models_over_the_same_weights_have_digests_of_their_own(tiny: Any) -> None:
    """The built-in adapters lie over minilm's file; a plain folder is its own source."""
    from edgelm.models import load_model

    digests = [load_model(name).source_digest for name in ("minilm", "minilm-ner")]
    found = [open_subject(name).identity for name in ("minilm", "minilm-ner")]
    assert [about["digest"] for about in found] == digests
    assert digests[0] != digests[1]
    about = open_subject(str(tiny("ner"))).identity
    assert about["digest"] == about["source"]["digest"]
