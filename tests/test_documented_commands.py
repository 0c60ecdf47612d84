"""Every block of commands in docs/ is run as it is printed, or says why not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgelm import samples

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
SHELL = ("sh", "bash", "console")
# Pages whose code is run elsewhere: by tests/test_docs.py, by tests/runtimes/service.
ELSEWHERE = ("library.md", "service.md")
# What a page's Python takes for granted.
BEFORE = {
    "codes.md": "documents = questions = ['A man plays a flute.', 'A train to Paris.']\n",
    "binary-index.md": (
        "import numpy as np\n"
        "codes = np.arange(64, dtype=np.uint8).reshape(2, 32)\n"
        "ids, queries, rows = ['c', 'd'], codes[:1], np.ones((1, 256), np.float32)\n"
    ),
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and why it is not run, if it is not."""

    language: str
    text: str
    reason: str | None


def blocks(path: Path) -> list[Block]:
    found = re.findall(
        r"^(?:<!-- not run: (.+?) -->\n)?```(\w*)\n(.*?)^```$",
        path.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    return [Block(language, text, reason or None) for reason, language, text in found]


def has_command(text: str) -> bool:
    return re.search(r"(^|\| |-m )edgelm [a-z]", text, re.MULTILINE) is not None


def to_run(path: Path, languages: tuple[str, ...] = SHELL) -> list[Block]:
    return [
        block
        for block in blocks(path)
        if block.reason is None
        and block.language in languages
        and (block.language == "python" or has_command(block.text))
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_block_of_commands_is_run_or_says_why_not(path: Path) -> None:
    for block in blocks(path):
        if has_command(block.text):
            assert block.language in SHELL, block.text
            assert block.reason is not None or path.name in RUN, block.text
    fenced = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.M | re.S)
    stray = re.findall(r"^ {4,}edgelm [a-z].*", fenced, re.MULTILINE)
    assert not stray, "commands stand in fenced blocks"
    marks = len(re.findall("<!-- not run", path.read_text(encoding="utf-8")))
    assert marks == sum(block.reason is not None for block in blocks(path))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_document_compiles(path: Path) -> None:
    for block in blocks(path):
        if block.language == "python":
            compile(block.text, str(path), "exec")


def test_a_page_with_python_runs_it_somewhere() -> None:
    with_python = {p.name for p in PAGES if to_run(p, ("python",))}
    assert with_python <= {*RUN, *ELSEWHERE}


def run_page(page: str, folder: Path) -> None:
    """Run a page's blocks in order in a folder, as a reader would."""
    programs = folder / ".bin"
    programs.mkdir()
    for name, start in (("edgelm", "-m edgelm"), ("python", "")):
        script = programs / name
        script.write_text(
            f'#!/bin/sh\nexec "{sys.executable}" {start} "$@"\n', encoding="utf-8"
        )
        script.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "HF_HUB_OFFLINE": "1",
    }
    languages = SHELL if page in ELSEWHERE else (*SHELL, "python")
    code, ran = BEFORE.get(page, ""), 0
    for block in to_run(DOCS / page, languages):
        if block.language == "python":
            code += block.text
            command = [sys.executable, "-c", code]
        else:
            command = ["bash", "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran


def write_data(folder: Path) -> None:
    """Stand-ins, from the built-in samples, for the files that pages name."""
    texts = [" ".join(text.split()) for text in samples.calibration()[:240]]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (folder / "mix.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    rows = [{"id": str(4900 + 10 * i), "text": t} for i, t in enumerate(texts)]
    rows += [{"id": i, "text": f"To delete: {i}."} for i in ("4983", "5836")]
    similar = samples.similarity()
    order = [
        {**row, "score": row["score"] - 2.5, "topic": i % 5}
        for i, row in enumerate(similar)
    ]
    files = {
        "corpus.jsonl": rows,
        "more.jsonl": rows[:5],
        "science.jsonl": rows[:100],
        "news.jsonl": rows[100:200],
        "pairs.jsonl": order,
        "stsb/test.jsonl": similar,
    }
    (folder / "stsb").mkdir()
    for name, content in files.items():
        lines = "\n".join(json.dumps(row) for row in content)
        (folder / name).write_text(lines, encoding="utf-8")


# Page -> what it finds in its folder beside the data: built-in model's bundle by name.
RUN: dict[str, dict[str, str]] = {
    "binary-index.md": {},
    "codes.md": {},
    "factorization.md": {},
    "few-shot-ner.md": {},
    "index.md": {},
    "library.md": {"bundle": "minilm"},
    "paragraph-vectors.md": {},
    "provenance.md": {"bundle": "embedding"},
    "throughput.md": {},
    "tutorial.md": {},
}
QUICK = ("provenance.md",)


@pytest.mark.parametrize(
    "page",
    [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in RUN],
)
def test_the_commands_of_a_document_run_as_printed(
    page: str, bundles: Callable[..., Path], tmp_path: Path
) -> None:
    write_data(tmp_path)
    labelled = samples.ner() if page == "few-shot-ner.md" else samples.similarity()
    lines = "\n".join(json.dumps(row) for row in labelled)
    (tmp_path / "labelled.jsonl").write_text(lines, encoding="utf-8")
    for name, model in RUN[page].items():
        shutil.copytree(bundles(model), tmp_path / name)
    if page == "binary-index.md":  # it begins with a bundle that gives codes
        make = (
            "compress minilm -o coded --codes 256 --max-texts 64",
            "export coded --target cpu -o bundle",
        )
        for args in make:
            command = [sys.executable, "-m", "edgelm", *args.split()]
            subprocess.run(command, cwd=tmp_path, check=True)
    run_page(page, tmp_path)
