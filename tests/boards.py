"""Recorded boards as folders."""

from __future__ import annotations

import json
from pathlib import Path

RECORDED = Path(__file__).parent / "data" / "boards"
BOARDS = tuple(sorted(path.stem for path in RECORDED.glob("*.json")))


def lay_out(name: str, root: Path) -> Path:
    """Put what a board has below ``/`` into a folder."""
    recorded = json.loads((RECORDED / f"{name}.json").read_text(encoding="utf-8"))
    for path, content in recorded["files"].items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return root
