"""The latency suite's parts: steadiness, intervals, meters, texts of a length, recorded runs."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import edgelm
from edgelm.cli import cli
from edgelm.errors import GateError, InputError
from edgelm.evaluate.contender import texts_of
from edgelm.evaluate.measurement import check_speedup
from edgelm.evaluate.process import Meter
from edgelm.evaluate.recorded import check_comparable, compare_recorded, read_recorded
from edgelm.evaluate.steady import is_steady, median_interval, percentile, warm_up
from edgelm.reports.summary import front, summary_page
from edgelm.runtimes.sensors import cpu_clock, cpu_energy
from tests.boards import lay_out

Bundles = Callable[..., Path]


def test_warm_up_ends_when_the_times_settle() -> None:
    """Ten times as slow at first, then steady; or never."""
    found = warm_up(lambda call: 10.0 if call < 15 else 1.0 + 0.001 * (call % 3))
    assert found.steady
    assert (found.first_ms, found.calls) == (10, 50)
    restless = warm_up(lambda call: 1.0 + (call // 10) % 2)
    assert (restless.steady, restless.calls) == (False, 300)
    assert warm_up(lambda call: 1000.0 * (1 + call % 20)).calls < 300
    assert not is_steady([1.0, 1.0])
    assert not is_steady([1.0, 1.0, 1.2])


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 13))
def test_the_interval_of_a_median_holds_as_often_as_it_says(n: int) -> None:
    """Against every way in which n values can lie on the two sides of the median."""
    values = list(range(n))
    low, high, confidence = median_interval(values)
    sides = itertools.product((0, 1), repeat=n)
    below = [sum(way) for way in sides]  # values under the median
    # It lies within unless fewer than k values are on one side.
    k = values.index(int(low)) + 1
    inside = np.mean([k <= count <= n - k for count in below])
    assert confidence == pytest.approx(float(inside) if n > 1 else 0)
    assert high == n - k
    assert (confidence >= 0.95) == (n >= 6)


def test_percentiles() -> None:
    values = list(range(100, 0, -1))
    assert [percentile(values, q) for q in (0.5, 0.9, 0.99)] == [51, 91, 100]
    assert percentile([3.0], 0.99) == 3


def test_texts_have_the_tokens_that_are_asked_for(bundles: Bundles) -> None:
    tokenizer = edgelm.load(bundles("embedding")).engine.tokenizer
    made = texts_of(
        ["the man plays", "a book"], 12, 5, lambda t: len(tokenizer.encode(t))
    )
    assert [len(tokenizer.encode(text)) for text in made] == [12] * 5
    assert len(set(made)) > 1


def test_the_meter_reads_the_sensors_that_there_are(tmp_path: Path) -> None:
    with Meter(os.getpid(), tmp_path) as meter:
        pass
    assert meter.joules is None
    assert meter.memory_mib > 10
    counter = tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj"
    counter.parent.mkdir(parents=True)
    for name, value in (("intel-rapl:0:0", "999"), ("intel-rapl:1", "500000")):
        part = counter.parent.with_name(name)
        part.mkdir()
        (part / "energy_uj").write_text(value)
    counter.write_text("1500000\n")
    assert cpu_energy(tmp_path) == 2.0
    with Meter(os.getpid(), tmp_path) as meter:
        counter.write_text("4500000\n")
    assert meter.joules == pytest.approx(3.0)
    with Meter(os.getpid(), tmp_path) as meter:
        counter.write_text("0\n")  # the counter began anew
    assert meter.joules is None
    with Meter(os.getpid(), lay_out("orin-nano-super", tmp_path / "board")) as meter:
        pass
    assert meter.joules is not None
    assert meter.joules > 0


def test_the_clock_of_the_processor(tmp_path: Path) -> None:
    assert cpu_clock(tmp_path).now is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("cpu MHz\t\t: 2445.4\ncpu MHz : 1.0\n")
    assert cpu_clock(tmp_path).now == 2445.4
    folder = tmp_path / "sys/devices/system/cpu/cpu0/cpufreq"
    folder.mkdir(parents=True)
    (folder / "scaling_governor").write_text("performance\n")
    for name, khz in (("cur", 1200000), ("min", 800000), ("max", 3000000)):
        (folder / f"scaling_{name}_freq").write_text(f"{khz}\n")
    clock = cpu_clock(tmp_path)
    assert (clock.governor, clock.now, clock.least, clock.most) == ("performance", 1200, 800, 3000)  # fmt: skip


def test_a_speedup_that_is_demanded() -> None:
    ratio = {"against": "m", "latency": 0.5, "latency_interval": [0.4, 0.8]}
    check_speedup("b", ratio, 2.0)
    with pytest.raises(
        GateError,
        match=r"b answers one text 2\.00 times as fast as m \(1\.25 to 2\.50\); at least 2\.1",
    ):
        check_speedup("b", ratio, 2.1)


@pytest.fixture(scope="module")
def recorded(bundles: Bundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark, by the command."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "t.txt").write_text("the man\nparis\n", encoding="utf-8")
    args = [
        "bench",
        str(bundles("embedding")),
        "--texts",
        str(folder / "t.txt"),
        "--rounds",
        "2",
    ]
    result = CliRunner().invoke(
        cli, [*args, "--concurrency", "none", "--report", str(folder / "v1.old")]
    )
    assert result.exit_code == 0, result.output
    assert (folder / "v1.old.html").is_file()
    again = [
        "--report",
        str(folder / "new"),
        "--compare-with",
        str(folder / "v1.old.json"),
    ]
    result = CliRunner().invoke(cli, [*args, "--concurrency", "2", *again])
    assert result.exit_code == 0, result.output
    assert "as recorded at" in result.stderr
    return folder / "v1.old.json"


def changed(result: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(result)
    *parts, last = path.split(".")
    place = found
    for part in parts:
        place = place[part]
    place[last] = value
    return found


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("environment.cpu", "Another", "CPU: "),
        ("environment.cores", 96, "cores: "),
        ("environment.device.after.power_mode_id", 2, "power mode: unknown now, 2 recorded"),
        ("environment.cpu_clock.governor", "powersave", "governor: "),
        ("workload.digest", "0" * 64, "texts: "),
        ("workload.threads", 7, "threads: unknown now, 7 recorded"),
    ],
)  # fmt: skip
def test_runs_of_different_machines_are_not_compared(
    recorded: Path, path: str, value: Any, named: str
) -> None:
    result = read_recorded(recorded)
    with pytest.raises(InputError, match=rf"cannot be compared with: .*{named}"):
        check_comparable(result, changed(result, path, value))


def test_a_recorded_run_against_itself(recorded: Path, tmp_path: Path) -> None:
    result = read_recorded(recorded)
    found = compare_recorded(result, result)
    assert (found["latency"], found["throughput"]) == (1, 1)
    assert found["throughput_range"][0] <= 1 <= found["throughput_range"][1]
    (tmp_path / "x.json").write_text('{"kind": "edgelm-eval"}')
    with pytest.raises(InputError, match="is no benchmark that can be compared with"):
        read_recorded(tmp_path / "x.json")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        read_recorded(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-speedup", "2x"], "name it with --against"),
        (
            ["--against", "minilm", "--min-speedup", "fast"],
            "takes a factor such as 1.5x",
        ),
        (["--concurrency", "1;2"], "Whole numbers with commas"),
    ],
)
def test_options_that_make_no_sense(
    bundles: Bundles, options: list[str], message: str
) -> None:
    result = CliRunner().invoke(cli, ["bench", str(bundles("embedding")), *options])
    assert (result.exit_code, message in result.stderr) == (2, True)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)
)
def test_the_front_is_what_nothing_beats(pairs: list[tuple[int, int]]) -> None:
    points = [(str(i), float(x), float(y)) for i, (x, y) in enumerate(pairs)]
    best = front(points, rising=True)
    assert best
    for name, x, y in points:
        beaten = any(a <= x and b >= y and (a < x or b > y) for _, a, b in points)
        assert (name in best) != beaten
    assert front([(n, x, -y) for n, x, y in points], rising=False) == best


def test_one_page_of_everything(
    recorded: Path, bundles: Bundles, tmp_path: Path
) -> None:
    """Eval and bench of the same two bundles, and a checkpoint's report, in one file."""
    first, second = str(bundles("embedding")), str(bundles("embedding", "int8"))
    rows = [{"text1": f"the man {w}", "text2": w, "score": i, "domain": "a<b"}
            for i, w in enumerate(["plays", "reads", "runs", "paris", "river", "book"])]  # fmt: skip
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = ["eval", second, "--data", str(data), "--against", first]
    args += ["--report", str(tmp_path / "e"), "--resamples", "100"]
    result = CliRunner().invoke(cli, args)
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(cli, args)
    assert (again.exit_code, "--force" in again.stderr) == (1, True)
    (tmp_path / "t.txt").write_text("the man\nparis\n", encoding="utf-8")
    args = [
        "bench",
        second,
        "--against",
        first,
        "--rounds",
        "1",
        "--texts",
        str(tmp_path / "t.txt"),
    ]
    result = CliRunner().invoke(cli, [*args, "--report", str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    layer = {"step": 0, "layer": "h.0.fc", "shape": [4, 4], "sparsity": 0.5, "error_initial": 0.2,
             "error_mask": 0.1, "error": 0.05, "refine": "dsnot", "repair": "bias", "seconds": 1.0,
             "tried": {}, "bytes": {"dense": 64, "bitmask": 40, "zstd": 30}}  # fmt: skip
    about = {"format": "edgelm-checkpoint", "model": {"name": "m", "source_digest": "d" * 64},
             "recipe": {"version": 1, "steps": [{"method": "sparsify"}]}, "calibration_digest": "c" * 64,
             "cost": {"texts": 3, "tokens": 30}, "created_by": "edgelm", "report": [layer]}  # fmt: skip
    (tmp_path / "edgelm.json").write_text(json.dumps(about))
    names = [str(tmp_path / name) for name in ("e.json", "b.json", "edgelm.json")]
    page = tmp_path / "all.html"
    result = CliRunner().invoke(cli, ["report", *names, "-o", str(page)])
    assert result.exit_code == 0, result.output
    html = page.read_text(encoding="utf-8")
    for part in ("Quality against latency", "By length, label and domain", "Where the answers changed most",
                 "Throughput against concurrency", "Error by layer", "What lies on the disk",
                 "Where the numbers come from", "To get them again", "not beaten in both"):  # fmt: skip
        assert part in html, part
    assert html.index('class="verdict"') < html.index("<h2>")
    assert "http" not in html
    assert "a&lt;b" in html
    assert "a<b" not in html
    benched = json.loads(Path(names[1]).read_text())
    digests = {contender["identity"]["digest"] for contender in benched["contenders"]}
    assert len(digests) == 2
    assert all(digest in html for digest in digests)
    # Behind the last plot of every section there is a table.
    sections = [part for part in html.split("<h2>") if "<svg" in part]
    assert len(sections) >= 5
    assert all(part.rindex("<table") > part.rindex("<svg") for part in sections)
    (tmp_path / "x.json").write_text("[]")
    result = CliRunner().invoke(
        cli, ["report", str(tmp_path / "x.json"), "-o", str(tmp_path / "y.html")]
    )
    assert (result.exit_code, "is no result of edgelm" in result.stderr) == (1, True)
    assert not (tmp_path / "y.html").exists()
    assert summary_page([json.loads(recorded.read_text())])
