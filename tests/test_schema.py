"""Strict dataclasses from plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from edgelm import schema


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"]
    inner: Inner
    many: tuple[Inner, ...] = ()
    counts: Mapping[str, int] | None = None
    either: float | str = 0.0
    flag: bool = False


GOOD: dict[str, Any] = {"name": "x", "kind": "a", "inner": {"size": 3}}


def build(data: Any, **options: Any) -> Outer:
    return schema.build(Outer, data, "file.toml", ValueError, **options)


def test_nested_values_and_defaults() -> None:
    found = build(
        {
            **GOOD,
            "many": [{"size": 1, "ratio": 2}],
            "counts": {"k": 1},
            "either": "2:4",
            "flag": True,
        }
    )
    assert found == Outer("x", "a", Inner(3), (Inner(1, 2.0),), {"k": 1}, "2:4", True)
    assert isinstance(found.many[0].ratio, float)


def test_plain_is_the_reverse() -> None:
    found = build({**GOOD, "many": [{"size": 1}], "either": 0.25})
    assert build(schema.plain(found)) == found
    assert "counts" not in schema.plain(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nmae": "x"}, "unknown key 'nmae'"),
        ({"inner": {"size": 3, "x": 1}}, "'inner' has the unknown key 'x'"),
        ({"inner": {}}, "'inner' lacks the key 'size'"),
        ({"inner": {"size": "3"}}, "'size' must be of type int. Got '3'"),
        ({"inner": {"size": True}}, "'size' must be of type int. Got True"),
        ({"inner": {"size": 3.5}}, "'size' must be of type int"),
        ({"inner": 7}, "'inner' must be a table. Got 7"),
        ({"kind": "c"}, "'kind' must be one of a, b. Got 'c'"),
        ({"many": "no"}, "'many' must be a list"),
        ({"counts": {"k": "v"}}, r"'counts'\['k'\] must be of type int"),
        ({"flag": 1}, "'flag' must be of type bool"),
        ({"either": [1]}, "'either' must be of type str"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"file.toml.*{message}"):
        build({**GOOD, **change})


def test_extra_keys_may_be_ignored_at_every_depth() -> None:
    found = build({**GOOD, "new": 1, "inner": {"size": 1, "newer": 2}}, extra=True)
    assert found.inner == Inner(1)


@pytest.mark.parametrize("data", [None, [], 3])
def test_not_a_table(data: Any) -> None:
    with pytest.raises(ValueError, match="must be a table"):
        build(data)
