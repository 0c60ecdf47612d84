"""The pytest plug-in: options and fixtures for tests of a bundle; docs/suites.md.

pytest imports it whenever it starts, so nothing heavy is imported before a fixture is used.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgelm.evaluate.subjects import Subject

# Option -> what it is.
_OPTIONS = {
    "--edgelm-bundle": "the bundle (or model) that is tested",
    "--edgelm-against": "what it is compared with: a bundle, a model or a server",
    "--edgelm-data": "labelled data for the accuracy suite, as for edgelm eval --data; else built-in",
    "--edgelm-split": "of data in BEIR's layout: which qrels; else test",
    "--edgelm-max-drop": "with --edgelm-against: how much worse the measure may be, for example 1%",
    "--edgelm-min-speedup": "with --edgelm-against: how many times as fast one text must be, for example 1.5x",
    "--edgelm-max-p95-ms": "longest 95th percentile of one text, ms",
    "--edgelm-texts": "texts for the latency suite, .txt or .jsonl; else built-in",
    "--edgelm-rounds": "turns of each model in the latency suite; else 6",
    "--edgelm-threads": "threads of a model; else all cores",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("edgelm", "tests of an edgelm bundle")
    for name, what in _OPTIONS.items():
        group.addoption(name, metavar="VALUE", help=what)


def setting(config: pytest.Config, name: str) -> str | None:
    """The value of an option, such as ``max-drop``; None if it was not given."""
    found: str | None = config.getoption(f"--edgelm-{name}")
    return found


def number(config: pytest.Config, name: str, ends: str = "") -> float | None:
    """The number of an option, behind which ``ends`` may stand.

    Raises:
        pytest.UsageError: It is no number.
    """
    text = setting(config, name)
    if text is None:
        return None
    match = re.fullmatch(rf"\s*(\d+(?:\.\d+)?)\s*{ends}?\s*", text)
    if match is None:
        raise pytest.UsageError(f"--edgelm-{name} takes a number. Got {text}.")
    return float(match[1])


def _reference(config: pytest.Config, name: str) -> str:
    """What an option names; the test is skipped where it was not given."""
    reference = setting(config, name)
    if reference is None:
        pytest.skip(f"needs --edgelm-{name}")
    return reference


def _open(config: pytest.Config, name: str) -> Subject:
    from edgelm.evaluate.subjects import Settings, open_subject

    threads = number(config, "threads")
    return open_subject(
        _reference(config, name), Settings(None if threads is None else int(threads))
    )


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest) -> Any:
    """What ``--edgelm-bundle`` names, opened: an `Embedder`, an `EntityRecognizer` or a `Scorer`."""
    from edgelm.evaluate.contender import open_any

    threads = number(request.config, "threads")
    return open_any(
        _reference(request.config, "bundle"), None if threads is None else int(threads)
    )


@pytest.fixture(scope="session")
def against(request: pytest.FixtureRequest) -> Any:
    """What ``--edgelm-against`` names, opened in the same way."""
    from edgelm.evaluate.contender import open_any

    threads = number(request.config, "threads")
    return open_any(
        _reference(request.config, "against"), None if threads is None else int(threads)
    )


@pytest.fixture(scope="session")
def edgelm_quality(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `edgelm.evaluate.examine.examine` finds, with the models and data of the options."""
    from edgelm.evaluate.accuracy import find_datasets
    from edgelm.evaluate.examine import examine

    config = request.config
    subject = _open(config, "bundle")
    other = _open(config, "against") if setting(config, "against") else None
    data = find_datasets(
        setting(config, "data") or "built-in",
        subject,
        setting(config, "split") or "test",
    )
    return examine(subject, data, other)


@pytest.fixture(scope="session")
def edgelm_latency(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What `edgelm.evaluate.latency.benchmark` measures, with the models and texts of the options."""
    from edgelm import samples
    from edgelm.calibration import read_texts
    from edgelm.evaluate.latency import Workload, benchmark

    config = request.config
    path = setting(config, "texts")
    texts = samples.calibration()[::3] if path is None else read_texts(Path(path))
    threads = number(config, "threads")
    workload = Workload(
        tuple(text for text in texts if text.strip()),
        rounds=int(number(config, "rounds") or 6),
        threads=None if threads is None else int(threads),
    )
    models = [_reference(config, "bundle"), *_given(config, "against")]
    return benchmark(models, workload)


def _given(config: pytest.Config, name: str) -> Iterator[str]:
    if (value := setting(config, name)) is not None:
        yield value
