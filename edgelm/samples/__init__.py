"""Small text samples that edgelm ships, written for the purpose; nothing is taken from elsewhere.

They let a fresh machine calibrate, verify and measure without a network. The
labelled ones are small: they show that a pipeline works, not which model is best.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def calibration() -> list[str]:
    """About 1,400 passages of 5 to 180 words, broad in domain, register and length."""
    return [row["text"] for row in _rows("calibration.jsonl")]


def ner() -> list[dict[str, Any]]:
    """Sentences: ``text`` and ``entities`` (start, end, label; PER, LOC, ORG, MISC)."""
    return _rows("ner.jsonl")


def similarity() -> list[dict[str, Any]]:
    """Pairs: ``text1``, ``text2`` and ``score``, 0 (unrelated) to 5 (same meaning)."""
    return _rows("similarity.jsonl")


def search() -> list[dict[str, Any]]:
    """Documents (``id``, ``title``, ``text``) and queries (``id``, ``text``, ``relevant``), by ``type``."""
    return _rows("search.jsonl")


def _rows(name: str) -> list[dict[str, Any]]:
    text = (resources.files(__name__) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
