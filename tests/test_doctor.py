"""The doctor: what recorded boards say, what a broken installation is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm import doctor
from edgelm.doctor import board_findings, examine
from tests.boards import BOARDS, lay_out


def by_name(root: Path) -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in board_findings(root)}


def test_a_machine_that_is_no_jetson_has_no_board(tmp_path: Path) -> None:
    assert board_findings(tmp_path) == []


@pytest.mark.parametrize("name", BOARDS)
def test_every_board_has_the_same_findings(name: str, tmp_path: Path) -> None:
    found = by_name(lay_out(name, tmp_path))
    assert list(found) == ["board", "JetPack", "power mode", "GPU clock", "memory"]
    unsaid = [f for f in found.values() if f.state != "ok" and not f.fix]
    assert not unsaid, "what is not well has a way out"


def test_an_orin_nano_in_its_fastest_mode(tmp_path: Path) -> None:
    found = by_name(lay_out("orin-nano-super", tmp_path))
    assert {f.state for f in found.values()} == {"ok"}
    assert "jetson-orin-nano" in found["board"].found
    assert "TensorRT 10.3" in found["JetPack"].found
    assert found["power mode"].found == "MAXN_SUPER (2)"
    assert found["GPU clock"].found == "306 MHz, between 306 and 1020"
    assert "jetson_clocks" in found["GPU clock"].fix
    assert found["memory"].found == "3929 MiB free, 0 MiB of swap on disk"


def test_locked_clocks_and_swap_on_disk(tmp_path: Path) -> None:
    found = by_name(lay_out("orin-nx-16", tmp_path))
    assert found["GPU clock"].fix == ""
    assert found["memory"].found.endswith("8191 MiB of swap on disk")
    assert found["power mode"].found == "25W (3)"
    assert "this mode only" in found["power mode"].fix


def test_an_old_jetpack_is_broken(tmp_path: Path) -> None:
    found = by_name(lay_out("xavier-nx", tmp_path))["JetPack"]
    assert found.state == "broken"
    assert "Xavier" in found.fix


def test_unknown_is_a_warning_that_says_what_to_report(tmp_path: Path) -> None:
    found = by_name(lay_out("unknown", tmp_path))
    assert {name for name, f in found.items() if f.state == "warning"} == {
        "board",
        "JetPack",
        "power mode",
        "GPU clock",
    }
    assert "41.1.0" in found["JetPack"].found
    assert "nv_tegra_release" in found["JetPack"].fix


def test_little_memory_names_the_way_out(tmp_path: Path) -> None:
    lay_out("orin-nano-super", tmp_path)
    (tmp_path / "proc/meminfo").write_text("MemAvailable: 900000 kB\n", "utf-8")
    found = by_name(tmp_path)["memory"]
    assert (found.state, "swap" in found.fix) == ("warning", True)


@pytest.mark.parametrize(
    ("body", "state", "words"),
    [
        ("__version__ = '10.3.0'", "ok", "10.3.0"),
        ("__version__ = '8.6.2'", "broken", "8.6.2"),
        (
            "raise ImportError('libnvdla_compiler.so: cannot open')",
            "broken",
            "libnvdla",
        ),
        ("import os; os.abort()", "broken", "signal 6"),
        (None, "absent", "no Python module"),
    ],
)
def test_tensorrt_is_tried_in_a_process_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    body: str | None,
    state: str,
    words: str,
) -> None:
    """A module of that name, as a broken installation is one."""
    if body is not None:
        (tmp_path / "tensorrt.py").write_text(body, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = {f.what: f for f in examine(tmp_path)}["TensorRT"]
    assert (found.state, words in found.found) == (state, True), found


def test_a_provider_that_is_only_listed_is_broken() -> None:
    """This ONNX Runtime has no CUDA; asked for it, a session gets the CPU."""
    finding = doctor._provider("CUDAExecutionProvider")
    assert finding.state == "broken"
    assert "gets CPUExecutionProvider" in finding.found
    assert doctor._provider("CPUExecutionProvider").state == "ok"
