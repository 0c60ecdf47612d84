"""docs/jetson.md says what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from edgelm.runtimes.tensorrt.capabilities import CAPABILITIES, Checked
from edgelm.targets.board import releases

TEXT = (Path(__file__).parents[2] / "docs" / "jetson.md").read_text(encoding="utf-8")


def test_the_table_is_the_list_of_capabilities() -> None:
    kinds = "|".join(get_args(Checked))
    rows = re.findall(rf"^\| (.+) \| ({kinds}) \|$", TEXT, re.MULTILINE)
    assert rows == [(c.what, c.checked) for c in CAPABILITIES]


def test_nothing_is_claimed_to_have_run_on_hardware() -> None:
    ran = any(c.checked == "hardware" for c in CAPABILITIES)
    assert ("Nothing on this page has been run on a Jetson" in TEXT) is not ran


def test_every_release_is_in_the_table() -> None:
    rows = re.findall(r"^\| ([\d., ]+) \|.*\| (yes|refused.*) \|$", TEXT, re.MULTILINE)
    told = {v.strip(): what == "yes" for names, what in rows for v in names.split(",")}
    assert told == {r.jetpack: r.runs for r in releases()}
