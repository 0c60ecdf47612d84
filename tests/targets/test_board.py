"""Boards as they describe themselves: which target, which JetPack; unknown is said."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgelm.targets import load_target
from edgelm.targets.board import detect, family_member, find_release, releases
from tests.boards import BOARDS, lay_out

EXPECTED = {
    "agx-orin": ("jetson-agx-orin", "39.2.0", "7.2", True),
    "orin-nano-super": ("jetson-orin-nano", "36.4.3", "6.2", True),
    "orin-nx-16": ("jetson-orin-nx", "36.4.7", "6.2.1", True),
    "thor": ("jetson-thor-t5000", "38.4.0", "7.1", True),
    "xavier-nx": ("jetson-xavier-nx", "35.6.0", "5.1", False),
}


def test_every_recorded_board_is_expected() -> None:
    assert set(BOARDS) == set(EXPECTED) | {"unknown"}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_board_is_its_target(name: str, tmp_path: Path) -> None:
    target, l4t, jetpack, runs = EXPECTED[name]
    board = detect(lay_out(name, tmp_path))
    assert board is not None
    assert (board.target, board.l4t) == (target, l4t)
    assert board.release is not None
    assert (board.release.jetpack, board.release.runs) == (jetpack, runs)
    member = family_member("jetson", tmp_path)
    assert member.target == target
    assert board.model in member.why


def test_a_machine_that_is_no_jetson(tmp_path: Path) -> None:
    assert detect(tmp_path) is None
    member = family_member("jetson", tmp_path)
    assert member.target == "jetson-orin-nano-4gb"
    assert "most conservative" in member.why


def test_an_unknown_board_is_named_and_the_family_stays_conservative(
    tmp_path: Path,
) -> None:
    board = detect(lay_out("unknown", tmp_path))
    assert board is not None
    assert board.l4t == "41.1.0"
    assert board.release is None
    assert board.target is None
    member = family_member("jetson", tmp_path)
    assert member.target == "jetson-orin-nano-4gb"
    assert "Orin Giga" in member.why


@pytest.mark.parametrize(
    ("module", "kib", "target"),
    [
        ("p3701-0000", 30_000_000, "jetson-agx-orin-32gb"),
        ("p3701-0000", 62_000_000, "jetson-agx-orin"),
        ("p3767-0004", 3_400_000, "jetson-orin-nano-4gb"),
        ("p3767-0001", 7_600_000, "jetson-orin-nx-8gb"),
    ],
)
def test_memory_tells_the_modules_of_one_number_apart(
    tmp_path: Path, module: str, kib: int, target: str
) -> None:
    lay_out("agx-orin", tmp_path)
    (tmp_path / "proc/device-tree/compatible").write_text(
        f"nvidia,x+{module}\0nvidia,tegra234\0", encoding="utf-8"
    )
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {kib} kB\n", encoding="utf-8")
    board = detect(tmp_path)
    assert board is not None
    assert board.target == target


def test_without_a_module_the_model_and_the_memory_decide(tmp_path: Path) -> None:
    """A T4000, whose module no table names."""
    lay_out("thor", tmp_path)
    tree = tmp_path / "proc/device-tree"
    (tree / "compatible").write_text("nvidia,tegra264\0", encoding="utf-8")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 64000000 kB\n", "utf-8")
    board = detect(tmp_path)
    assert board is not None
    assert board.target == "jetson-thor-t4000"


def test_a_container_without_a_device_tree_still_knows_its_release(
    tmp_path: Path,
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(
        "# R36 (release), REVISION: 4.3, GCID: 1\n", encoding="utf-8"
    )
    board = detect(tmp_path)
    assert board is not None
    assert (board.target, board.model, board.memory_mib) == (None, "", 0)
    assert board.release is not None
    assert board.release.jetpack == "6.2"


def test_releases_are_told_apart_by_the_longest_prefix() -> None:
    assert [
        find_release(v) and find_release(v).jetpack for v in ("36.4", "36.4.4")
    ] == [  # type: ignore[union-attr]
        None,
        "6.2.1",
    ]
    assert find_release("36.40.1") is None
    assert find_release("") is None
    prefixes = [p for r in releases() for p in r.l4t]
    assert len(set(prefixes)) == len(prefixes)
    assert {r.jetpack for r in releases() if not r.runs} == {"4.6", "5.1", "6.0"}


def test_a_target_for_the_board_at_hand_is_found_by_the_family(tmp_path: Path) -> None:
    member = family_member("jetson", lay_out("orin-nx-16", tmp_path))
    assert load_target(member.target).memory is not None
