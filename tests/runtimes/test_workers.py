"""Workers chosen by measurement: kept in the cache, never trusted blindly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import edgelm
from edgelm.archive import cache_folder
from edgelm.bundle import open_bundle
from edgelm.cli import cli
from edgelm.runtimes import workers
from edgelm.runtimes.workers import choose_workers


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "cores", lambda: 3)


def remembered() -> list[Path]:
    return sorted((cache_folder() / "workers").iterdir())


@pytest.mark.parametrize("kind", ["embedding", "scorer"])
def test_a_choice_is_made_once_and_kept(
    bundles: Callable[..., Path], kind: str
) -> None:
    bundle = open_bundle(bundles(kind))
    assert choose_workers(bundle) in (1, 2, 3)
    (path,) = remembered()
    for count in (1, 2, 3):  # what the file says is what counts from now on
        path.write_text(json.dumps({"workers": count}), encoding="utf-8")
        assert choose_workers(bundle) == count
    choose_workers(bundle, threads=1)
    assert len(remembered()) == 2


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"workers": 0}', '{"workers": 99}', '{"workers": true}']
)
def test_a_cache_that_cannot_be_used_is_measured_anew(
    bundles: Callable[..., Path], text: str
) -> None:
    bundle = open_bundle(bundles("embedding"))
    choose_workers(bundle)
    (path,) = remembered()
    path.write_text(text, encoding="utf-8")
    found = choose_workers(bundle)
    assert json.loads(path.read_text(encoding="utf-8")) == {"workers": found}
    assert remembered() == [path]


def test_where_nothing_can_be_kept_it_still_works(
    bundles: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("in the way", encoding="utf-8")
    assert choose_workers(open_bundle(bundles("embedding"))) in (1, 2, 3)


def test_load_and_run_take_it(bundles: Callable[..., Path]) -> None:
    path = bundles("embedding")
    texts = ["the man plays a flute", "", "the old river of paris"]
    expected = edgelm.load(path).encode(texts)  # type: ignore[union-attr]
    model = edgelm.load(path, workers="auto")
    assert model.engine.workers in (1, 2, 3)
    np.testing.assert_allclose(
        model.encode(texts),  # type: ignore[union-attr]
        expected,
        atol=1e-6,
    )
    result = CliRunner().invoke(cli, ["run", str(path), "--workers", "auto", "a man"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(cli, ["run", str(path), "--workers", "0", "a man"])
    assert result.exit_code == 2
