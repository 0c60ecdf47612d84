"""The suites on tiny models: what they measure, how they gate, what the report shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm import schema
from edgelm.cli import cli
from edgelm.errors import EdgelmError, GateError, InputError
from edgelm.evaluate import accuracy
from edgelm.evaluate.latency import Workload, benchmark
from edgelm.evaluate.reference import open_reference
from edgelm.metrics import cosine, entity_f1, snr_db
from edgelm.reports.charts import bars, number, shorten
from edgelm.reports.latency import verdicts
from edgelm.reports.summary import summary_page
from edgelm.runtimes.sensors import device_state
from tests.boards import BOARDS, lay_out

Bundles = Callable[..., Path]


def embedder(path: Path) -> edgelm.Embedder:
    model = edgelm.load(path)
    assert isinstance(model, edgelm.Embedder)
    return model


@pytest.fixture(scope="module")
def measured(bundles: Bundles) -> dict[str, Any]:
    work = Workload(
        ("the man plays", "paris", "an old book of the river"),
        rounds=2,
        single=4,
        concurrency=(1, 3),
        lengths=(8, 16),
        batch_sizes=(1, 2),
    )
    return benchmark(
        [str(bundles("embedding")), str(bundles("embedding", "int8"))], work
    )


def test_a_benchmark_measures_what_it_says(
    measured: dict[str, Any], bundles: Bundles
) -> None:
    for contender in measured["contenders"]:
        percentiles = [contender[f"p{q}_ms"] for q in (50, 90, 95, 99)]
        assert percentiles == sorted(percentiles)
        assert percentiles[0] > 0
        assert [load["threads"] for load in contender["loads"]] == [1, 3]
        assert all(load["texts_per_s"] > 0 for load in contender["loads"])
        keys = [(cell["length"], cell["batch"]) for cell in contender["cells"]]
        assert keys == [(8, 1), (8, 2), (16, 1), (16, 2)]
        assert contender["warm_up"]["calls"] >= 30
        assert contender["identity"]["kind"] == "bundle"
        assert len(contender["identity"]["digest"]) == 64
        assert len(contender["latencies_ms"]) == len(contender["throughputs"]) == 2
        assert all(len(turn) == 4 for turn in contender["latencies_ms"])
        assert contender["texts_per_s"] > 0
        assert contender["memory_mib"] > 10
        assert contender["cold_start_ms"] > contender["p50_ms"]
    first, second = measured["contenders"]
    assert (first["precision"], second["precision"]) == ("fp32", "int8")
    assert first["size_mb"] == pytest.approx(
        sum(p.stat().st_size for p in bundles("embedding").iterdir()) / 1e6
    )
    (ratio,) = measured["ratios"]
    pairs = zip(first["throughputs"], second["throughputs"], strict=True)
    assert ratio["throughput"] == pytest.approx(np.median([a / b for a, b in pairs]))
    assert (
        ratio["throughput_range"][0]
        <= ratio["throughput"]
        <= ratio["throughput_range"][1]
    )
    assert ratio["throughput_interval"] == ratio["throughput_range"]
    assert ratio["confidence"] == 0.5
    assert all(cell["ratio"] == 1 for cell in first["cells"])
    assert measured["environment"]["versions"]["edgelm"] == edgelm.__version__
    json.dumps(measured)


def test_a_benchmark_records_the_state_of_the_board(
    bundles: Bundles, tmp_path: Path
) -> None:
    root, bundle = lay_out("orin-nano-super", tmp_path), str(bundles("embedding"))
    zone = next(root.glob("sys/class/thermal/*/type")).with_name("temp")

    def warm(what: str, done: int, total: int | None) -> None:
        zone.write_text("61500")

    work = Workload(("paris",), rounds=1, single=1)
    result = benchmark([bundle], work, warm, root)
    device = json.loads(json.dumps(result))["environment"]["device"]
    assert device["after"]["power_mode"] == "MAXN_SUPER"
    assert device["after"]["gpu_clock"] == {"now": 306.0, "least": 306.0, "most": 1020.0}  # fmt: skip
    name = zone.with_name("type").read_text().strip()
    assert device["before"]["temperatures_c"][name] < 61.5
    assert device["after"]["temperatures_c"][name] == 61.5
    page = summary_page([result])
    assert "MAXN_SUPER (2)" in page
    assert "306 MHz before, 306 after, between 306 and 1020" in page
    assert " to 61.5" in page

    def switch(what: str, done: int, total: int | None) -> None:
        if done:
            (root / "var/lib/nvpmodel/status").write_text("pmode:0003")

    with pytest.raises(EdgelmError, match=r"from MAXN_SUPER \(2\) to 7W \(3\)"):
        benchmark([bundle], work, switch, root)


@pytest.mark.parametrize("board", [*BOARDS, None])
def test_the_page_shows_what_a_board_tells_and_no_more(
    measured: dict[str, Any], tmp_path: Path, board: str | None
) -> None:
    state = device_state(lay_out(board, tmp_path) if board else tmp_path)
    device = dict.fromkeys(("before", "after"), schema.plain(state))
    result = {**measured, "environment": {**measured["environment"], "device": device}}
    html = summary_page([result])
    assert ("Power mode" in html) == (state.power_mode_id is not None)
    assert ("GPU clock" in html) == (state.gpu_clock is not None)
    assert ("Temperatures" in html) == bool(state.temperatures_c)
    assert all(zone in html for zone in state.temperatures_c)


class Checker(HTMLParser):
    """Open tags match, and nothing points to a network."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.links: list[str] = []
        self.labels = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect"):
            self.stack.append(tag)
        names = dict(attrs)
        self.links += [v for k, v in attrs if k in ("href", "src") and v]
        self.labels += (
            tag == "svg"
            and names.get("role") == "img"
            and bool(names.get("aria-label"))
        )

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_the_page_is_whole_and_needs_no_network(measured: dict[str, Any]) -> None:
    measured = json.loads(json.dumps(measured))
    measured["contenders"][0]["name"] = "<script>alert('&')</script>"
    html = summary_page([measured])
    checker = Checker()
    checker.feed(html)
    assert checker.stack == []
    assert checker.links == []
    assert checker.labels == 4 + 1 + 2  # bars, the curve, files of two bundles
    assert "<script" not in html
    assert "http" not in html
    for sentence in verdicts(measured):
        assert "times the throughput" in sentence


def test_a_contender_that_cannot_be_opened_is_one_sentence(bundles: Bundles) -> None:
    with pytest.raises(EdgelmError, match="There is no folder"):
        benchmark([str(bundles("embedding")), "no/such/model"], Workload(("a",)))


def test_no_texts_no_benchmark(bundles: Bundles) -> None:
    with pytest.raises(InputError, match="no texts to measure"):
        benchmark([str(bundles("embedding"))], Workload(()))
    with pytest.raises(InputError, match="33 tokens are longer than the 32"):
        benchmark([str(bundles("embedding"))], Workload(("a",), lengths=(33,)))
    with pytest.raises(InputError, match="batch sizes must be at least 1"):
        Workload(("a",), batch_sizes=(0,))


@pytest.mark.parametrize("kind", ["embedding", "ner", "scorer"])
def test_a_model_in_torch_answers_as_its_bundle(
    bundles: Bundles, tiny: Any, kind: str
) -> None:
    bundle: Any = edgelm.load(bundles(kind))
    model: Any = open_reference(str(tiny(kind)))
    texts = ["the man plays in paris", "", "a book " * 40]
    if kind == "embedding":
        np.testing.assert_allclose(model.encode(texts), bundle.encode(texts), atol=1e-5)
    elif kind == "scorer":
        pairs = list(zip(texts, texts[::-1], strict=True))
        np.testing.assert_allclose(model.score(pairs), bundle.score(pairs), atol=1e-5)
    else:
        ours, theirs = bundle.extract(texts), model.extract(texts)
        assert [[(e.start, e.end, e.label) for e in row] for row in ours] == [
            [(e.start, e.end, e.label) for e in row] for row in theirs
        ]


def test_bench_command(bundles: Bundles, tmp_path: Path) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("the man\nparis\n", encoding="utf-8")
    args = [
        "bench",
        str(bundles("embedding")),
        "--texts",
        str(texts),
        "--rounds",
        "1",
        "--report",
        str(tmp_path / "r"),
    ]
    result = CliRunner().invoke(cli, [*args, "--json", "--max-p95-ms", "100000"])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert written == json.loads(result.stdout)
    assert "<svg" in (tmp_path / "r.html").read_text(encoding="utf-8")
    again = CliRunner().invoke(cli, args)
    assert (again.exit_code, "--force" in again.stderr) == (1, True)
    slow = CliRunner().invoke(cli, [*args, "--force", "--max-p95-ms", "0.000001"])
    assert slow.exit_code == 3
    assert "at most 1e-06 ms are allowed" in slow.stderr


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_similarity_is_the_rank_correlation(bundles: Bundles, tmp_path: Path) -> None:
    model = embedder(bundles("embedding"))
    texts = ["the man", "a woman plays", "paris river", "old book", "london ."]
    vectors = model.encode(texts).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gold = vectors[0] @ vectors.T
    rows = [
        {"text1": texts[0], "text2": t, "score": float(g)}
        for t, g in zip(texts, gold, strict=True)
    ]
    data = accuracy.load_dataset(write_rows(tmp_path / "s.jsonl", rows))
    scores = accuracy.evaluate(model, data)
    assert next(iter(scores)) == "spearman"
    assert scores["spearman"] == pytest.approx(100, abs=1)
    assert scores["pearson"] == pytest.approx(100, abs=1e-2)


def test_ner_data_in_both_forms(bundles: Bundles, tmp_path: Path) -> None:
    model = edgelm.load(bundles("ner"))
    rows = [
        {
            "tokens": ["anna", "of", "new", "paris"],
            "tags": ["B-PER", "O", "B-LOC", "I-LOC"],
        }
    ]
    data = accuracy.load_dataset(write_rows(tmp_path / "t.jsonl", rows))
    assert data.rows == [
        {
            "text": "anna of new paris",
            "entities": [
                {"start": 0, "end": 4, "label": "PER"},
                {"start": 8, "end": 17, "label": "LOC"},
            ],
        }
    ]
    same = accuracy.load_dataset(write_rows(tmp_path / "e.jsonl", list(data.rows)))  # type: ignore[arg-type]
    assert accuracy.evaluate(model, data) == accuracy.evaluate(model, same)
    rows = [{"tokens": ["x"], "tags": ["B-enzyme"]}]
    other = accuracy.load_dataset(write_rows(tmp_path / "o.jsonl", rows))
    with pytest.raises(
        InputError, match="has the entity types enzyme; the model has LOC, PER"
    ):
        accuracy.evaluate(model, other)


def test_retrieval_in_beirs_layout(bundles: Bundles, tmp_path: Path) -> None:
    """Each query is one of the documents, so the first hit is always right."""
    docs = [
        "the man plays a flute",
        "paris and london",
        "old books",
        "the winter garden market",
    ]
    (tmp_path / "qrels").mkdir()
    write_rows(
        tmp_path / "corpus.jsonl",
        [{"_id": f"d{i}", "title": "", "text": t} for i, t in enumerate(docs)],
    )
    write_rows(
        tmp_path / "queries.jsonl",
        [{"_id": f"q{i}", "text": t} for i, t in enumerate(docs)],
    )
    qrels = "query-id\tcorpus-id\tscore\n" + "".join(
        f"q{i}\td{i}\t1\n" for i in range(3)
    )
    (tmp_path / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8")
    data = accuracy.load_dataset(tmp_path)
    assert [row["id"] for row in data.rows] == ["q0", "q1", "q2"]
    assert accuracy.evaluate(embedder(bundles("embedding")), data) == {
        "ndcg@10": 100.0,
        "recall@10": 100.0,
        "recall@100": 100.0,
        "map@100": 100.0,
    }


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        ([{"a": 1}], "has the fields a"),
        (
            [{"text1": "a", "text2": "b", "score": 1}, {"text1": "a"}],
            "line 2: there is no field 'text2'",
        ),
    ],
)
def test_bad_data_is_named(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        accuracy.load_dataset(write_rows(tmp_path / "d.jsonl", rows))


def test_data_of_another_task_is_refused(bundles: Bundles, tmp_path: Path) -> None:
    data = accuracy.load_dataset(
        write_rows(tmp_path / "d.jsonl", [{"text1": "a", "text2": "b", "score": 1}])
    )
    with pytest.raises(
        InputError, match="is similarity data, which a model for ner cannot use"
    ):
        accuracy.evaluate(edgelm.load(bundles("ner")), data)


def test_eval_command_gates(bundles: Bundles, tmp_path: Path, tiny: Any) -> None:
    args = [
        "eval",
        str(bundles("embedding")),
        "--data",
        "built-in",
        "--against",
        str(tiny("embedding")),
    ]
    result = CliRunner().invoke(cli, [*args, "--json", "--max-drop", "1%"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.strip().split("\n")]
    assert [next(k for k in row if k in ("spearman", "ndcg@10")) for row in rows] == [
        "spearman",
        "ndcg@10",
    ]
    bad = CliRunner().invoke(cli, [*args, "--max-drop", "little"])
    assert (bad.exit_code, "takes a percentage such as 1%" in bad.stderr) == (2, True)
    alone = CliRunner().invoke(cli, [*args[:4], "--max-drop", "1%"])
    assert alone.exit_code == 2


def test_a_drop_beyond_what_is_allowed() -> None:
    accuracy.check_drop(80.0, 79.3, 1.0, "f1")
    accuracy.check_drop(80.0, 90.0, 0.0, "f1")
    with pytest.raises(
        GateError,
        match=r"f1 fell by 1\.25 % \(from 80\.00 to 79\.00\); at most 1 % is allowed",
    ):
        accuracy.check_drop(80.0, 79.0, 1.0, "f1")


def test_entity_f1_by_hand() -> None:
    gold = [[(0, 1, "PER"), (2, 4, "LOC")], [(0, 2, "ORG")], []]
    found = [[(0, 1, "PER"), (2, 3, "LOC")], [(0, 2, "PER")], [(5, 6, "LOC")]]
    scores = entity_f1(gold, found)
    assert scores == {"precision": 1 / 4, "recall": 1 / 3, "f1": 2 / 7}
    assert entity_f1([[]], [[]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3), noise=st.floats(1e-6, 1.0)
)
def test_snr_is_the_noise_level(seed: int, scale: float, noise: float) -> None:
    draw = np.random.default_rng(seed)
    signal = scale * draw.normal(size=2000)
    level = -20 * np.log10(noise)
    assert snr_db(
        signal, signal + noise * scale * draw.normal(size=2000)
    ) == pytest.approx(level, abs=0.6)


def test_cosine_of_rows() -> None:
    a = np.array([[1.0, 0], [1, 1], [0, 0]], np.float32)
    b = np.array([[0.0, 2], [3, 3], [1, 0]], np.float32)
    np.testing.assert_allclose(cosine(a, b), [0, 1, 0], atol=1e-7)


def test_chart_labels() -> None:
    assert [number(x) for x in (1234.5, 99.95, 3.14159, 0.0)] == [
        "1234",
        "100.0",
        "3.14",
        "0.00",
    ]
    assert shorten("short") == "short"
    assert shorten("/a/very/long/path/to/the/bundle") == "…long/path/to/the/bundle"
    assert 'aria-label="T, ms (lower is better). a: 1.00 ms"' in bars(
        "T", "ms", [("a", 1.0)], better="lower"
    )
