"""The tree is what pyproject says, and imports point one way."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest
import tomllib

import edgelm

ROOT = Path(__file__).parent.parent
LINKED = ("export", "runtimes", "targets")
SOURCES = sorted(
    path
    for folder in ("edgelm", *LINKED)
    for path in (ROOT / folder).rglob("*.py")
    if not path.parent.is_symlink()
)


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = (
        relative.parts if relative.parts[0] == "edgelm" else ("edgelm", *relative.parts)
    )
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path, *, everywhere: bool = True) -> set[str]:
    """Modules that a file imports; type-checking imports do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found = set()
    for node in nodes:
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("edgelm"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_package_list_is_true() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = set(listed["tool"]["setuptools"]["packages"])
    there = {module_name(path) for path in SOURCES if path.name == "__init__.py"}
    assert packages == there


@pytest.mark.parametrize("name", LINKED)
def test_the_links_are_links(name: str) -> None:
    link = ROOT / "edgelm" / name
    assert link.is_symlink()
    assert link.resolve() == ROOT / name


@pytest.mark.parametrize("name", LINKED)
def test_there_is_one_copy_of_each_module(name: str) -> None:
    module = importlib.import_module(f"edgelm.{name}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / name / "__init__.py"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_modules_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").split("\n")) <= 400


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_one_way(path: Path) -> None:
    """targets <- core <- compress <- export; runtimes stands on little."""
    name, used = module_name(path), {m for m in imports(path) if m.startswith("edgelm")}

    def within(*allowed: str) -> None:
        strays = {
            m
            for m in used
            if m != "edgelm"
            and not any(m == a or m.startswith(a + ".") for a in allowed)
        }
        assert not strays, f"{name} imports {strays}"

    base = ("edgelm.errors", "edgelm.schema")
    if name.startswith("edgelm.targets"):
        within("edgelm.targets", *base)
    elif name.startswith("edgelm.runtimes"):
        within(
            "edgelm.runtimes",
            "edgelm.targets",
            "edgelm.atomic",
            "edgelm.archive",
            "edgelm.bundle",
            "edgelm.manifest",
            "edgelm.golden",
            "edgelm.lines",
            "edgelm.metrics",
            *base,
        )
    elif (
        name.startswith(
            (
                "edgelm.evaluate",
                "edgelm.tuning",
                "edgelm.cli",
                "edgelm.demo",
                "edgelm.suites",
                "edgelm.pytest_plugin",
            )
        )
        or name == "edgelm"
    ):
        return
    elif name.startswith("edgelm.export"):
        assert not any(
            m.startswith(("edgelm.compress", "edgelm.evaluate", "edgelm.cli"))
            for m in used
        )
    elif name in ("edgelm.recipe", "edgelm.pipeline", "edgelm.__main__"):
        assert not any(m.startswith(("edgelm.export", "edgelm.evaluate")) for m in used)
    elif name.startswith("edgelm.compress"):
        assert not any(
            m.startswith(("edgelm.export", "edgelm.evaluate", "edgelm.cli"))
            for m in used
        )
    else:
        above = ("edgelm.compress", "edgelm.export", "edgelm.evaluate", "edgelm.cli")
        assert not any(m.startswith(above) for m in used)


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if "runtimes" in p.parts], ids=module_name
)
def test_the_device_never_imports_torch(path: Path) -> None:
    assert not {m.split(".")[0] for m in imports(path)} & {
        "torch",
        "transformers",
        "onnx",
        "scipy",
    }


@pytest.mark.parametrize(
    "name",
    ["edgelm", "edgelm.runtimes", "edgelm.targets", "edgelm.export", "edgelm.compress"],
)
def test_all_is_the_namespace(name: str) -> None:
    module = importlib.import_module(name)
    assert list(module.__all__) == sorted(
        module.__all__, key=lambda n: (not n.isupper(), not n[0].isupper(), n)
    )
    assert all(hasattr(module, member) for member in module.__all__)


def test_every_module_imports() -> None:
    for info in pkgutil.walk_packages(edgelm.__path__, "edgelm."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)


def test_the_error_tree_in_the_docstring_is_true() -> None:
    from edgelm import errors

    drawn = set((errors.__doc__ or "").split())
    classes = {
        n
        for n, c in vars(errors).items()
        if isinstance(c, type) and issubclass(c, errors.EdgelmError)
    }
    assert classes <= drawn
