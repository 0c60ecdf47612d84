"""What edgelm uses of TensorRT's and polygraphy's modules, read from its own code.

`python names.py FOLDER` prints as JSON what of it the modules that are installed lack. Found are: ``trt.A.B``;
what is used of a variable that is annotated as ``tensorrt.Class``, with the names and the number of its
arguments; and what is used of modules that `require` gave.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Use:
    """A name that is used.

    Attributes:
        where: File and line.
        module: The module it is of.
        path: Attributes from the module on.
        arguments: How many arguments by position it is called with; None if it is not called.
        keywords: Names of arguments that it is called with.
    """

    where: str
    module: str
    path: tuple[str, ...]
    arguments: int | None = None
    keywords: tuple[str, ...] = ()


def uses(folder: Path) -> list[Use]:
    """Everything that the modules of a folder use."""
    found = []
    for file in sorted(folder.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                found += _of_function(function, file.name)
    return list(dict.fromkeys(found))


def _of_function(function: ast.FunctionDef, file: str) -> Iterator[Use]:
    names: dict[str, tuple[str, tuple[str, ...]]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            named = re.search(
                r"((?:tensorrt|polygraphy)(?:\.[a-z]\w*)*)\.([A-Z]\w*)",
                ast.unparse(node.annotation),
            )
            if named:
                names[node.target.id] = named[1], (named[2],)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            asked = re.match(
                r"require\('([\w.]+)'.*?\)((?:\.\w+)*)$", ast.unparse(node.value)
            )
            if asked and asked[1].startswith(("tensorrt", "polygraphy")):
                rest = tuple(part for part in asked[2].split(".") if part)
                names[node.targets[0].id] = asked[1], rest
    called = {id(n.func): n for n in ast.walk(function) if isinstance(n, ast.Call)}
    for name, (module, path) in names.items():
        yield Use(f"{file}:{function.lineno}", module, path)
        for node in ast.walk(function):
            chain = _chain(node)
            if len(chain) < 2 or chain[0] != name:
                continue
            call = called.get(id(node))
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if call is None:
                yield Use(where, module, (*path, *chain[1:]))
            else:
                keywords = tuple(k.arg for k in call.keywords if k.arg)
                yield Use(where, module, (*path, *chain[1:]), len(call.args), keywords)


def _chain(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, ast.Name):
        return (node.id,)
    if isinstance(node, ast.Attribute):
        before = _chain(node.value)
        return (*before, node.attr) if before else ()
    return ()


def problem(use: Use) -> str:
    """What is wrong with a use; empty if the modules have it."""
    value: Any = importlib.import_module(use.module)
    for attribute in use.path:
        if _set_by_its_methods(value, attribute):
            return ""
        if not hasattr(value, attribute):
            return f"{use.where}: {use.module} has no {'.'.join(use.path)}"
        value = getattr(value, attribute)
    if use.arguments is None:
        return ""
    named = parameters(value)
    if named is None:
        return f"{use.where}: {'.'.join(use.path)} has no signature"
    if use.arguments > len(named) or not set(use.keywords) <= set(named):
        return f"{use.where}: {'.'.join(use.path)} takes {named}"
    return ""


def _set_by_its_methods(value: Any, attribute: str) -> bool:
    """Whether the methods of a class written in Python set an attribute."""
    if not inspect.isclass(value) or not value.__module__.startswith("polygraphy"):
        return False
    bases = [base for base in value.__mro__ if base is not object]
    return any(f"self.{attribute} = " in inspect.getsource(base) for base in bases)


def parameters(value: Any) -> list[str] | None:
    """Names of the arguments of a function or a class, self left out; None if not known."""
    target = value.__init__ if inspect.isclass(value) else value
    try:
        listed = inspect.signature(target).parameters.values()
        named = [p.name for p in listed if p.kind is not p.VAR_KEYWORD]
        more = [p for p in listed if p.kind is p.VAR_KEYWORD]
        if inspect.isclass(value) and more:
            for base in value.__mro__[1:]:
                named += parameters(base) or [] if base is not object else []
    except (TypeError, ValueError):
        # pybind11 writes signatures into the docstring, one a line where there are several.
        text = target.__doc__ or ""
        found = re.findall(r"\w+\((self[^)]*?)\) ->", text)
        if not found:
            return None
        longest = max(found, key=len)
        named = re.findall(r"(\w+)\s*:", re.sub(r"\[[^\]]*\]", "", longest))
    return [name for name in named if name != "self"]


if __name__ == "__main__":
    every = uses(Path(sys.argv[1]))
    wrong = [text for use in every if (text := problem(use))]
    shown = [[u.module, ".".join(u.path), u.arguments, u.keywords] for u in every]
    print(json.dumps({"used": shown, "wrong": wrong}))
