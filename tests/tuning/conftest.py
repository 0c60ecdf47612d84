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


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured tables of a test are its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
