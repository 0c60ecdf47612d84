"""What each route answers, by plain HTTP against a real process."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest

import edgelm
from tests.runtimes.service.conftest import Server

Bundles = Callable[..., Path]
TEXTS = ["A man is playing a flute.", "It is raining in Paris.", ""]


@pytest.fixture(scope="module")
def vectors(bundles: Bundles) -> np.ndarray:
    """What the library itself gives, text by text: batches of one, as in requests of one."""
    model = edgelm.load(bundles("minilm", "int8"))
    assert isinstance(model, edgelm.Embedder)
    return np.stack([model.encode([text])[0] for text in TEXTS])


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_embed_gives_the_vectors_of_the_library_always_nested(
    client: httpx.Client, vectors: np.ndarray
) -> None:
    one = client.post("/embed", json={"inputs": TEXTS[0]})
    np.testing.assert_array_equal(np.float32(one.json()), vectors[:1])
    assert int(one.headers["x-compute-tokens"]) == 9
    assert one.headers["x-compute-characters"] == str(len(TEXTS[0]))
    for name in (
        "x-total-time",
        "x-tokenization-time",
        "x-queue-time",
        "x-inference-time",
    ):
        assert float(one.headers[name]) >= 0
    batch = np.float32(post(client, "/embed", inputs=TEXTS))
    assert (batch * vectors).sum(
        1
    ).min() > 0.99  # dynamic int8: neighbours matter a little
    cut = np.float32(post(client, "/embed", inputs=TEXTS[0], dimensions=64))
    due = vectors[:1, :64] / np.linalg.norm(vectors[:1, :64])
    np.testing.assert_allclose(cut, due, atol=1e-6)


def test_embed_takes_token_ids(client: httpx.Client, vectors: np.ndarray) -> None:
    tokens = post(client, "/tokenize", inputs=TEXTS[0])[0]
    ids = [token["id"] for token in tokens]
    assert [t["text"] for t in tokens[:3]] == ["[CLS]", "A", "man"]
    assert (tokens[2]["start"], tokens[2]["stop"]) == (2, 5)
    assert tokens[0]["special"]
    assert tokens[0]["start"] is None
    for inputs in (ids, [ids], [TEXTS[0]]):
        found = np.float32(post(client, "/embed", inputs=inputs))
        np.testing.assert_array_equal(found, vectors[:1])
    assert post(client, "/decode", ids=[ids, ids[1:3]]) == [
        "a man is playing a flute.",
        "a man",
    ]


def test_similarity_is_the_cosine(client: httpx.Client, vectors: np.ndarray) -> None:
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS}
    found = post(client, "/similarity", inputs=inputs)
    np.testing.assert_allclose(found, vectors @ vectors[0], atol=1e-6)
    assert found[0] == pytest.approx(1)


def test_long_texts_are_cut_and_counted_or_refused(client: httpx.Client) -> None:
    long = "word " * 400
    cut = client.post("/embed", json={"inputs": [long, "short"]})
    assert cut.headers["x-edgelm-truncated"] == "1"
    refused = client.post("/embed", json={"inputs": [long], "truncate": False})
    assert refused.status_code == 422
    assert refused.json() == {
        "error": "Input 0 is longer than the 256 tokens that the model takes. "
        "Shorten it, or let it be cut with truncate.",
        "error_type": "Validation",
    }
    assert len(post(client, "/tokenize", inputs=long)[0]) == 402  # nothing is cut here


def test_predict_knows_a_text_a_pair_and_a_batch(
    client: httpx.Client, bundles: Bundles
) -> None:
    scorer = edgelm.load(bundles("scorer"))
    assert isinstance(scorer, edgelm.Scorer)
    pairs = [("the man", "reads"), ("a river", "sings")]
    due = scorer.score(pairs)
    one = post(client, "/predict", inputs=list(pairs[0]))
    assert one == [
        {"score": pytest.approx(due[0], abs=1e-5), "label": scorer.labels[0]}
    ]
    many = post(client, "/predict", inputs=[list(pair) for pair in pairs])
    assert [row[0]["score"] for row in many] == pytest.approx(due.tolist(), abs=1e-5)
    raw = post(client, "/predict", inputs=list(pairs[0]), raw_scores=True)[0]["score"]
    assert 1 / (1 + np.exp(-raw)) == pytest.approx(due[0], abs=1e-5)
    single = client.post("/predict", json={"inputs": "the man"})
    assert single.status_code == 422
    assert "scores pairs of texts; input 0 has 1 texts" in single.json()["error"]


def test_rerank_speaks_both_dialects(client: httpx.Client, bundles: Bundles) -> None:
    scorer = edgelm.load(bundles("scorer"))
    assert isinstance(scorer, edgelm.Scorer)
    texts = ["reads a book", "the old city", "reads a book", "anna"]
    due = scorer.score([("the man", text) for text in texts])
    order = sorted(range(4), key=lambda i: -due[i])
    found = post(client, "/rerank", query="the man", texts=texts, return_text=True)
    assert [one["text"] for one in found] == [texts[i] for i in order]
    assert [one["score"] for one in found] == pytest.approx(
        due[order].tolist(), abs=1e-5
    )
    assert set(post(client, "/rerank", query="a", texts=["b"])[0]) == {"index", "score"}
    other = post(client, "/rerank", query="the man", documents=texts, top_n=2)
    assert other["object"] == "rerank"
    assert [one["relevance_score"] for one in other["results"]] == pytest.approx(
        due[order[:2]].tolist(), abs=1e-5
    )
    assert client.post("/rerank", json={"query": "a"}).status_code == 422


def test_ner_gives_what_the_library_gives(
    client: httpx.Client, bundles: Bundles
) -> None:
    recognizer = edgelm.load(bundles("ner"))
    assert isinstance(recognizer, edgelm.EntityRecognizer)
    texts = ["anna reads in paris", "the old man", "peter " * 90]
    due = recognizer.extract(texts)
    found = post(client, "/ner", inputs=texts)
    for entities, rows in zip(due, found, strict=True):
        assert [(r["entity_group"], r["word"], r["start"], r["end"]) for r in rows] == [
            (e.label, e.text, e.start, e.end) for e in entities
        ]
    assert sum(map(len, found))
    assert post(client, "/ner", inputs=texts[0]) == found[0]
    options = {"aggregation_strategy": "none", "threshold": 0.1}
    tokens = post(client, "/ner", inputs=texts[0], parameters=options)
    assert all(
        set(one) == {"entity", "score", "word", "start", "end"} for one in tokens
    )
    assert post(client, "/ner", inputs=texts[0], labels=[]) == []
    assert post(client, "/ner", inputs=texts[0], threshold=1.0) == []


def test_search_finds_the_nearest_document(client: httpx.Client) -> None:
    hits = post(client, "/search", query="someone makes music", k=2)
    assert next(hit["text"] for hit in hits) == "a man plays a flute"
    assert len(hits) == 2
    assert len(post(client, "/search", query=["a", "b", "c"])) == 3


def test_openai_embeddings_in_floats_and_base64(
    client: httpx.Client, vectors: np.ndarray
) -> None:
    plain = post(client, "/v1/embeddings", model="minilm", input=TEXTS[0])
    assert plain["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert plain["data"][0]["object"] == "embedding"
    packed = post(
        client, "/v1/embeddings", input=TEXTS[0], encoding_format="base64", dimensions=8
    )
    raw = base64.b64decode(packed["data"][0]["embedding"])
    due = vectors[0, :8] / np.linalg.norm(vectors[0, :8])
    np.testing.assert_allclose(np.frombuffer(raw, "<f4"), due, atol=1e-6)
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [
        "minilm",
        "ner",
        "pairs",
    ]
    assert client.get("/v1/models/ner").json()["object"] == "model"


def test_json_under_another_name_is_told_the_header(client: httpx.Client) -> None:
    """As curl sends it without -H."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = client.post("/embed", content=b'{"inputs": "a"}', headers=form)
    assert answer.status_code == 422
    assert "content-type: application/json" in answer.json()["error"]


@pytest.mark.parametrize("path", ["/", "/health", "/ping"])
def test_head_is_answered_as_balancers_ask(client: httpx.Client, path: str) -> None:
    answer = client.head(path)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_null_stands_for_a_field_that_is_not_given(client: httpx.Client) -> None:
    given = {"encoding_format": None, "dimensions": None, "user": None}
    data = post(client, "/v1/embeddings", input=TEXTS[0], **given)["data"]
    assert len(data[0]["embedding"]) == 384


@pytest.mark.parametrize(
    ("path", "body", "status", "kind", "message"),
    [
        ("/embed", b'{"inputs":', 400, "Validation", "The body is not JSON"),
        ("/embed", b"[" * 100_000, 400, "Validation", "parsing the body"),
        ("/embed", b'{"inputs": NaN}', 422, "Validation", "inputs: "),
        ("/embed", b'{"inputs": [1, Infinity]}', 422, "Validation", "inputs"),
        ("/embed", b'{"inputs": "\\ud800"}', 422, "Validation", "not Unicode"),
        ("/embed", b'{"inputs": []}', 400, "Empty", "cannot be empty"),
        ("/embed", b'{"inputs": [30522]}', 422, "Validation", "no token 30522"),
        ("/embed", b'{"inputs": [-1]}', 422, "Validation", "equal to 0"),
        ("/embed", b'{"inputs": 7}', 422, "Validation", "inputs"),
        ("/embed", b"{}", 422, "Validation", "inputs: Field required"),
        ("/embed", b"", 422, "Validation", "must be a JSON object"),
        ("/embed", b"[]", 422, "Validation", "must be a JSON object"),
        ("/embed", b'{"inputs": ["a", 5]}', 422, "Validation", "inputs.1: "),
        ("/embed", b'{"inputs": [[]]}', 422, "Validation", "at least 1 item"),
        ("/embed", b'{"inputs": "a", "dimensions": 999}', 422, "Validation", "384"),
        ("/embed", b'{"inputs": "a", "dimensions": 1e400}', 422, "Validation", "dim"),
        (
            "/embed",
            b'{"inputs": "a", "normalize": false}',
            422,
            "Validation",
            "length 1",
        ),
        ("/embed", b'{"inputs": "a", "prompt_name": "q"}', 422, "Validation", "'q'"),
        ("/embed", b'{"inputs": "a", "model": "x"}', 404, "Validation", "model 'x'"),
        ("/embed", b'{"inputs": "a", "model": "ner"}', 422, "Validation", "vectors"),
        (
            "/embed",
            b'{"inputs": "a", "truncation_direction": "Left"}',
            422,
            "Validation",
            "Left is not offered",
        ),
        ("/embed", b'["' + b"a" * 300_000 + b'"]', 413, "Validation", "200000 bytes"),
        (
            "/embed",
            b'{"inputs": [' + b",".join([b'"a"'] * 41) + b"]}",
            422,
            "Validation",
            "batch size 41 > maximum allowed batch size 40",
        ),
        ("/embed_all", b'{"inputs": "a"}', 424, "Backend", "token_embeddings"),
        ("/embed_sparse", b'{"inputs": "a"}', 424, "Backend", "no sparse"),
        ("/ner", b'{"inputs": "a", "threshold": NaN}', 422, "Validation", "threshold"),
        ("/search", b'{"query": "a", "k": 0}', 422, "Validation", "k: "),
        ("/", b'{"inputs": NaN}', 422, "Validation", "inputs"),
        ("/nowhere", b"{}", 404, "Validation", "Not Found"),
    ],
)
def test_what_is_wrong_is_said_in_the_shape_of_text_embeddings_inference(
    client: httpx.Client, path: str, body: bytes, status: int, kind: str, message: str
) -> None:
    answer = client.post(
        path, content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    assert answer.json()["error_type"] == kind
    assert message in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (b'{"model": "minilm", "input":', 400, None, None),
        (b'{"model": "minilm", "input": NaN}', 400, "input", None),
        (b'{"model": "minilm", "input": ""}', 400, "input", None),
        (b'{"model": "minilm", "input": []}', 400, "input", None),
        (b'{"model": "minilm", "input": ["a", ""]}', 400, "input", None),
        (b'{"input": "a", "encoding_format": "hex"}', 400, "encoding_format", None),
        (b'{"input": "a", "dimensions": 0}', 400, "dimensions", None),
        (b'{"input": "a", "dimensions": 385}', 400, "dimensions", None),
        (b'{"input": "a", "model": "gpt"}', 404, "model", "model_not_found"),
        (b'"' + b"a" * 300_000 + b'"', 413, None, None),
    ],
)
def test_what_is_wrong_is_said_in_the_shape_of_openai(
    client: httpx.Client, body: bytes, status: int, param: str | None, code: str | None
) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/embeddings", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == (
        "invalid_request_error",
        param,
        code,
    )


def test_text_that_is_not_said_to_be_json_is_refused(client: httpx.Client) -> None:
    """A page of another site may send text/plain without being asked."""
    plain = {"content-type": "text/plain"}
    assert client.post("/embed", content=b'{"inputs": "a"}', headers=plain).is_error
    assert client.post("/", content=b'{"inputs": "a"}', headers=plain).is_error


def test_info_health_metrics_and_page(client: httpx.Client) -> None:
    post(client, "/embed", inputs=TEXTS)
    info = client.get("/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert (info["max_input_length"], info["max_client_batch_size"]) == (256, 40)
    assert "classifier" in client.get("/info?model=ner").json()["model_type"]
    assert "reranker" in client.get("/info?model=pairs").json()["model_type"]
    assert client.get("/health").content == b""
    text = client.get("/metrics").text
    counted = re.search(
        r'edgelm_requests_total\{method="POST",route="/embed",status="200"\} (\d+)',
        text,
    )
    assert counted
    assert int(counted[1]) >= 1
    assert 'edgelm_batch_inputs_count{model="minilm"}' in text
    assert 'edgelm_queue_inputs{model="minilm"} 0.0' in text
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert not re.search(r"(src|href)=\"(https?:)?//", page.text)
    status = client.get("/status").json()
    assert [one["name"] for one in status["models"]] == ["minilm", "ner", "pairs"]
    assert status["index"]["rows"] == 3
    assert status["models"][0]["latency_ms"]["p50"] > 0


def test_the_log_is_json_lines_without_texts(
    client: httpx.Client, server: Server
) -> None:
    secret = "a very private sentence"
    post(client, "/embed", inputs=secret)
    client.post("/embed", json={"inputs": secret, "model": "no such"})
    lines = [line for line in server.log() if line["event"] == "request"]
    assert {line["status"] for line in lines} >= {200, 404}
    assert any(line.get("model") == "minilm" and line["inputs"] == 1 for line in lines)
    assert secret not in str(lines)
    assert not any(line["level"] == "error" for line in server.log())
