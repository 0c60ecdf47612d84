"""What the documents say is so: commands parse and run as printed, the tree is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import tomllib

from edgelm import samples
from edgelm.cli import COMMANDS, cli
from edgelm.recipe import parse_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
]


def commands(text: str) -> list[list[str]]:
    """Arguments of every `edgelm ...` that stands as code, in order."""
    found = re.findall(
        r"(?:^ *|`|^[^|\n]+\| |-m )edgelm ([a-z][^`\n#]*)", text, re.MULTILINE
    )
    # What stands behind a pipe or a redirection is not edgelm's.
    alone = [re.split(r" [|>] ", line.replace("\\|", "|"))[0] for line in found]
    return [shlex.split(line) for line in alone]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_document_parses(path: Path) -> None:
    for args in commands(path.read_text(encoding="utf-8")):
        command, rest = cli.get_command(click.Context(cli), args[0]), args[1:]
        while isinstance(command, click.Group) and rest:
            command = command.get_command(click.Context(command), rest.pop(0))
        assert command is not None, args
        known = {opt for p in command.params for opt in (*p.opts, *p.secondary_opts)}
        given = {arg.split("=")[0] for arg in rest if re.match("--?[a-z]", arg)}
        assert given <= known, args
        if rest and not {"...", "[OPTIONS]"} & set(rest):  # else it is only named
            # Parses flags and choices and runs nothing.
            command.make_context(args[0], rest)


def test_what_starts_the_service_on_a_machine_parses() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    found = [
        shlex.split(line)
        for line in re.findall(r"^ExecStart=\S+/edgelm (.*)$", text, re.MULTILINE)
    ]
    found += [
        json.loads(line)[1:]
        for line in re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    ]
    assert len(found) == 3
    for args in found:
        command = cli.get_command(click.Context(cli), args[0])
        assert command is not None
        command.make_context(args[0], args[1:])


def test_every_command_has_an_example_in_the_readme() -> None:
    assert {args[0] for args in commands(README)} == set(COMMANDS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_recipes_in_documents_are_valid() -> None:
    found = [
        tomllib.loads(block)
        for path in DOCUMENTS
        for block in re.findall(
            r"```toml\n(.*?)```", path.read_text("utf-8"), re.DOTALL
        )
    ]
    recipes = [data for data in found if "steps" in data]
    assert recipes
    for data in recipes:
        assert parse_recipe(data, "document").steps


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    words = set(re.findall(r"[\w.-]+/?", tree))
    there = {
        p.name + "/"
        for p in (ROOT / "edgelm").iterdir()
        if p.is_dir() and not p.is_symlink()
    }
    there |= {p.name for p in (ROOT / "edgelm").glob("*.py")}
    missing = {n for n in there if not n.startswith("__") and n not in words}
    assert not missing - {"__pycache__/"}
    for line in tree.strip().split("\n"):
        name, *more = line.split()
        if line.startswith("  "):
            paths = [n for n in (name, *more) if n.endswith((".py", "/"))]
            assert all((ROOT / "edgelm" / n).exists() for n in paths), line
        else:
            assert (ROOT / name).exists(), line


@pytest.mark.slow
def test_the_examples_of_the_library_run(
    bundles: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in a folder with the bundles that the page names."""
    names = {
        "bundle": "minilm",
        "ner-bundle": "minilm-ner",
        "pair-bundle": "minilm-similarity",
    }
    for name, model in names.items():
        (tmp_path / name).symlink_to(bundles(model))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    found: dict[str, Any] = {}
    exec("\n".join(blocks), found)
    assert found["truncated"].tolist() == [False, True]
    assert found["bits"].shape == (1, 48)
    assert [(e.start, e.end, e.label) for e in found["entities"]] == [
        (0, 2, "PER"),
        (4, 5, "LOC"),
    ]
    assert found["best"] == 2
    assert found["place"].index in (1, 2)


@pytest.mark.slow
def test_the_commands_and_the_code_of_the_readme_run_as_printed(tmp_path: Path) -> None:
    """In order, in an empty folder, as a user would; minutes."""

    def edgelm(*args: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "edgelm", *args],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (args, done.stderr)
        return done.stdout

    texts = [" ".join(text.split()) for text in samples.calibration()[:200]]
    (tmp_path / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    recipe = edgelm(
        "compress", "minilm", "--sparsity", "0.5", "--refine", "dsnot", "--dry-run"
    )
    (tmp_path / "recipe.toml").write_text(recipe, encoding="utf-8")
    edgelm(
        *("export", "minilm-ner", "--target", "cpu", "--token-embeddings", "last"),
        *("-o", "ner-bundle"),
    )
    edgelm("export", "minilm-similarity", "--target", "cpu", "-o", "pair-bundle")
    edgelm(
        "export",
        "minilm",
        "--target",
        "cpu",
        "--token-embeddings",
        "4",
        "-o",
        "token-bundle",
    )
    (tmp_path / "labelled.jsonl").write_text(
        "\n".join(json.dumps(row) for row in samples.similarity()), encoding="utf-8"
    )
    sentences = [
        {"text": row["text"], "label": row["type"] == "query"}
        for row in samples.search()
    ]
    (tmp_path / "sentences.jsonl").write_text(
        "\n".join(map(json.dumps, sentences)), encoding="utf-8"
    )
    (tmp_path / "labelled-words.jsonl").write_text(
        "\n".join(json.dumps(row) for row in samples.ner()), encoding="utf-8"
    )
    seen: set[str] = set()
    for args in commands(README):
        if (len(args) == 1 and args != ["doctor"]) or {"MODEL", "BUNDLE"} & set(args):
            continue  # only named; the demo has a test of its own
        if args[0] == "serve":
            continue  # runs until it is stopped; tests/runtimes/service starts it
        if args[0] in ("compress", "export") and "-o" in args:
            again = args[args.index("-o") + 1] in seen
            seen.add(args[args.index("-o") + 1])
            args = [*args, "--force"] if again else args
        edgelm(*args)
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    assert "edgelm.load" in code
    checks = (
        "\nassert vectors.shape == (1, 384)"
        "\nassert recognizer.extract(['Ada Lovelace wrote in London.'])[0][0].label == 'PER'"
    )
    subprocess.run([sys.executable, "-c", code + checks], cwd=tmp_path, check=True)


@pytest.mark.slow
def test_the_demo_ends_with_its_table(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgelm", "demo", "-o", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("minilm", "minilm-ner", "minilm-similarity"):
        assert f"{name} bundle" in done.stderr
        assert (tmp_path / "demo" / f"{name}-bundle" / "model.onnx").is_file()
