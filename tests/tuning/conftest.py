"""Problems that a search can be tried on in no time, and tiny models that it can really tune."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.conftest import WORDS


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety texts that the tiny models have words for."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = [w for w in WORDS if w.isalpha()]
    rows = [{"text": " ".join(draw.choices(words, k=8 + i % 9))} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where measured tables are kept: of these tests alone, and measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
