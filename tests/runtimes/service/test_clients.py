"""Clients that people have, against a real process."""

from __future__ import annotations

import numpy as np
import openai
import pytest
from huggingface_hub import InferenceClient
from langchain_openai import OpenAIEmbeddings

from tests.runtimes.service.conftest import Server

TEXTS = ["A man is playing a flute.", "It is raining."]


def test_openai(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        found = client.embeddings.create(model="minilm", input=TEXTS)
        plain = client.embeddings.create(
            model="minilm", input=TEXTS, encoding_format="float"
        )
        for one, other in zip(found.data, plain.data, strict=True):
            np.testing.assert_allclose(one.embedding, other.embedding, atol=1e-6)
        assert found.usage.total_tokens == 9 + 6
        short = client.embeddings.create(model="minilm", input=TEXTS[0], dimensions=16)
        assert np.linalg.norm(short.data[0].embedding) == pytest.approx(1, abs=1e-5)
        assert next(model.id for model in client.models.list()) == "minilm"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
            client.embeddings.create(model="gpt", input="a")
        with pytest.raises(openai.BadRequestError) as caught:
            client.embeddings.create(model="minilm", input="a", dimensions=999)
        assert caught.value.param == "dimensions"


def test_langchain(server: Server) -> None:
    """Told not to count tokens itself, which it does in OpenAI's vocabulary."""
    client = OpenAIEmbeddings(
        model="minilm",
        base_url=f"{server.url}/v1",
        api_key="unused",  # type: ignore[arg-type]
        check_embedding_ctx_length=False,
    )
    documents, query = client.embed_documents(TEXTS), client.embed_query(TEXTS[0])
    assert np.shape(documents) == (2, 384)
    np.testing.assert_allclose(documents[0], query, atol=1e-6)


def test_huggingface_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client posts to the URL that is its model."""
    # The tests are offline; this machine is no network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    root = InferenceClient(model=server.url)
    vectors = root.feature_extraction(TEXTS, normalize=True, truncate=True)  # type: ignore[arg-type]
    assert vectors.shape == (2, 384)
    cosines = root.sentence_similarity(TEXTS[0], TEXTS)
    assert cosines[0] == pytest.approx(1)
    route = InferenceClient(model=f"{server.url}/similarity")
    assert route.sentence_similarity(TEXTS[0], TEXTS) == pytest.approx(cosines)
    recognizer = InferenceClient(model=f"{server.url}/ner")
    found = recognizer.token_classification(
        "anna reads in paris", aggregation_strategy="simple"
    )
    assert found
    assert all(one.entity_group in ("PER", "LOC") for one in found)
    assert "anna reads in paris"[found[0].start : found[0].end] == found[0].word
