"""`edgelm tune` on a tiny model: the whole way, killed and resumed, and what it refuses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import edgelm
from edgelm.bundle import open_bundle
from edgelm.calibration import read_texts
from edgelm.cli import cli
from edgelm.errors import GateError, InputError, TargetError
from edgelm.evaluate.reference import open_reference
from edgelm.recipe import read_recipe
from edgelm.tuning.quality import judges
from edgelm.tuning.running import Job, Results
from edgelm.tuning.search import Limits
from edgelm.tuning.trial import Problem, evaluate_trial
from edgelm.tuning.tune import Request, tune

Tiny = Callable[[str], Path]


@contextmanager
def one_by_one() -> Iterator[Any]:
    """Evaluations in this process, the last one first."""

    def run(problem: Problem, jobs: Sequence[Job]) -> Results:
        for i in reversed(range(len(jobs))):
            yield i, evaluate_trial(problem, *jobs[i])

    yield run


def request(model: Path, texts: Path, drop: float = 20.0, **more: Any) -> Request:
    limits = Limits(drop, more.pop("p95_ms", None), more.pop("size_mb", None))
    options = {"trials": 8, "texts": str(texts), **more}
    return Request(str(model), options.pop("target", "cpu"), limits, **options)


def comparable(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What must not depend on when and where something was evaluated."""
    return [{k: v for k, v in row.items() if k != "costs"} for row in result["rows"]]


def children(parent: int) -> list[str]:
    """Processes that a process started to evaluate in."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if (
                stat[1] == str(parent)
                and b"spawn_main" in (folder / "cmdline").read_bytes()
            ):
                found.append(folder.name)
        except OSError:
            continue
    return found


class _Page(HTMLParser):
    """Counts tables, and notes what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tables, self.loaded = 0, []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tables += tag == "table"
        self.loaded += [v for k, v in attrs if k in ("src", "href")]


@pytest.mark.slow
def test_it_makes_a_bundle_that_keeps_to_the_limits(
    tiny: Tiny, texts: Path, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    result = tune(request(tiny("embedding"), texts), output, one_by_one)
    bundle = open_bundle(output / "bundle")
    chosen = next(f for f in result["finalists"] if f["chosen"])
    assert chosen["drop"] <= 20
    assert chosen["size_mb"] == pytest.approx(bundle.size_bytes / 1e6)
    assert result["considered"] == 8 == len(result["rows"])
    assert result["whole"] == sum("quality" in row for row in result["rows"])
    assert edgelm.load(output / "bundle").encode(["the man plays"]).shape == (1, 32)
    assert json.loads((output / "tune.json").read_text("utf-8")) == result
    if chosen["configuration"]["neurons"] < 1:
        assert read_recipe(output / "recipe.toml").steps
    page = _Page()
    page.feed((output / "report.html").read_text("utf-8"))
    assert page.tables == 2
    assert page.loaded == []
    assert [p.name for p in tmp_path.iterdir() if "tuned" in p.name] == ["tuned"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "measure"),
    [("ner", "entity F1 against"), ("scorer", "Spearman with the dense model")],
)
def test_other_tasks_are_judged_by_agreement(
    tiny: Tiny, texts: Path, tmp_path: Path, kind: str, measure: str
) -> None:
    asked = request(tiny(kind), texts, 99.0, trials=2)
    result = tune(asked, tmp_path / "tuned", one_by_one)
    assert measure in result["measure"]
    assert result["dense"] == pytest.approx(100)


@pytest.mark.slow
def test_killed_at_any_time_it_goes_on_and_finds_the_same(
    tiny: Tiny, texts: Path, tmp_path: Path
) -> None:
    """A real process, killed while its workers are at it, more than once."""
    model = tiny("embedding")
    due = tune(request(model, texts), tmp_path / "due", one_by_one)
    output = tmp_path / "tuned"
    command = [sys.executable, "-m", "edgelm", "tune", str(model), "--target", "cpu"]
    command += ["--texts", str(texts), "--max-drop", "20%", "--trials", "8"]
    command += ["--workers", "1", "-o", str(output), "--json"]
    journal = tmp_path / ".tuned.tuning" / "journal.jsonl"
    for lines in (3, 7):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 120
        while not journal.exists() or journal.read_bytes().count(b"\n") < lines:
            assert process.poll() is None
            assert time.monotonic() < end
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in workers):
            assert time.monotonic() < end  # nobody is left behind
    with journal.open("ab") as stream:
        stream.write(b'{"key": {"what": "cut sho')
    before = journal.read_bytes()
    found = tune(request(model, texts), output, one_by_one)
    kept = (output / "journal.jsonl").read_bytes()
    assert kept.startswith(before[: before.rfind(b"\n") + 1])
    assert comparable(found) == comparable(due)


@pytest.mark.slow
def test_other_settings_do_not_go_on_with_a_run(
    tiny: Tiny, texts: Path, tmp_path: Path
) -> None:
    @contextmanager
    def broken() -> Iterator[Any]:
        def run(problem: Problem, jobs: Sequence[Job]) -> Results:
            raise KeyboardInterrupt
            yield

        yield run

    output, model = tmp_path / "tuned", tiny("embedding")
    with pytest.raises(KeyboardInterrupt):
        tune(request(model, texts), output, broken)
    with pytest.raises(InputError, match=r"of a run with other settings \(seed\)"):
        tune(request(model, texts, seed=1), output, one_by_one)
    asked = request(model, texts, seed=1, trials=1)
    assert tune(asked, output, one_by_one, force=True)["considered"] == 1


@pytest.mark.slow
def test_nothing_that_keeps_to_the_limits_is_said_with_what_came_closest(
    tiny: Tiny, texts: Path, tmp_path: Path
) -> None:
    model = tiny("embedding")
    small = request(model, texts, trials=4, size_mb=1e-5)
    with pytest.raises(GateError, match=r"Nothing comes near .* 1e-05 MB: the small"):
        tune(small, tmp_path / "small", one_by_one)
    better = request(model, texts, -1000.0, trials=2)
    with pytest.raises(GateError, match=r"none keeps to .*\. Closest: .* MB\."):
        tune(better, tmp_path / "tuned", one_by_one)
    assert (tmp_path / "tuned/report.html").exists()
    assert not (tmp_path / "tuned/bundle").exists()


@pytest.mark.slow
def test_a_device_that_is_not_here_is_predicted_and_the_report_says_so(
    tiny: Tiny, texts: Path, tmp_path: Path
) -> None:
    asked = request(tiny("embedding"), texts, target="jetson-orin-nano", trials=2)
    result = tune(asked, tmp_path / "tuned", one_by_one)
    assert not result["measured"]
    assert all("p50_ms" not in f for f in result["finalists"])
    assert "nothing was measured" in (tmp_path / "tuned/report.html").read_text("utf-8")
    assert open_bundle(tmp_path / "tuned/bundle").manifest.target == "jetson-orin-nano"
    late = request(tiny("embedding"), texts, target="jetson-orin-nano", p95_ms=5.0)
    with pytest.raises(TargetError, match="not this machine"):
        tune(late, tmp_path / "other", one_by_one)


def test_labelled_data_is_split(tiny: Tiny, texts: Path, tmp_path: Path) -> None:
    sentences = list(read_texts(texts))
    rows = [
        {"text1": a, "text2": b, "score": i % 6}
        for i, (a, b) in enumerate(pairwise(sentences))
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    model = open_reference(str(tiny("embedding")))
    tuned_by, confirmed_by = judges(model, [], str(data))
    assert (len(tuned_by.rows), len(confirmed_by.rows)) == (66, 23)
    chosen = [row["text1"] for row in tuned_by.rows]
    assert not set(chosen) & {row["text1"] for row in confirmed_by.rows}
    assert tuned_by.measure == f"spearman on {data}"
    assert -100 <= tuned_by(model) <= 100


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--max-drop", "much"], 2, "takes a percentage"),
        (["--target", "toaster"], 1, "There is no target 'toaster'"),
        (["--data", "."], 1, "whose judgements are a test split"),
        (["--texts", "missing.txt"], 1, "Cannot read missing.txt"),
        (["--ray", "127.0.0.1:1"], 1, "There is no Ray cluster at 127.0.0.1:1"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny: Tiny, tmp_path: Path, texts: Path, arguments: list[str], code: int, said: str
) -> None:
    base = ["tune", str(tiny("embedding")), "-o", str(tmp_path / "tuned")]
    options = {"--target": "cpu", "--texts": str(texts)}
    options.update(dict(zip(arguments[::2], arguments[1::2], strict=True)))
    flat = [word for pair in options.items() for word in pair]
    result = CliRunner().invoke(cli, [*base, *flat])
    assert result.exit_code == code
    assert said in result.stderr
    assert list(tmp_path.iterdir()) == []
