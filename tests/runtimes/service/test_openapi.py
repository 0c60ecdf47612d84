"""Anything that the OpenAPI document allows, and much that it does not: no 5xx."""

from __future__ import annotations

import httpx2 as httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings

from tests.runtimes.service.conftest import Server

ROUTES = ["/embed", "/predict", "/rerank", "/similarity", "/tokenize", "/decode"]
ROUTES += ["/ner", "/search", "/v1/embeddings", "/v1/models/{name}", "/info"]


def probe(server: Server, path: str, examples: int) -> int:
    """Send examples to a route; how many were sent."""
    document = httpx.get(f"{server.url}/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    operation = next(iter(schema[path].values()))
    sent = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @schemathesis_given(operation)
    def check(case: schemathesis.Case) -> None:
        nonlocal sent
        sent += 1
        answer = case.call(base_url=server.url)
        assert answer.status_code < 500, (case.body, answer.text)

    check()
    return sent


def schemathesis_given(operation: object):  # type: ignore[no-untyped-def]
    from hypothesis import given
    from hypothesis import strategies as st
    from schemathesis import GenerationMode

    valid = operation.as_strategy()  # type: ignore[attr-defined]
    wrong = operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)  # type: ignore[attr-defined]
    return given(case=st.one_of(valid, wrong))


@pytest.mark.parametrize("path", ROUTES)
def test_a_few_requests_of_every_route_never_break_it(
    server: Server, path: str
) -> None:
    assert probe(server, path, 8)


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
def test_many_requests_of_every_route_never_break_it(server: Server, path: str) -> None:
    assert probe(server, path, 300)
