"""Curves: a file of its own that shows what it is given."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from edgelm.reports.charts import curves, scatter


def test_curves_stand_alone_and_are_to_scale() -> None:
    text = curves(
        "a < b",
        ["64", "128", "256"],
        [("first & best", [10.0, 20.0, 40.0]), ("second", [0.0, 5.0, 10.0])],
        level=("float", 50.0),
    )
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "first & best: 10.0, 20.0, 40.0" in root.attrib["aria-label"]
    drawn = [
        [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
        for line in root.iter("{http://www.w3.org/2000/svg}polyline")
    ]
    (x0, y0), (x1, y1), (x2, y2) = drawn[0]
    assert x1 - x0 == x2 - x1 > 0
    bottom = drawn[1][0][1]
    # Twice the value is twice the height, and the level is at 50 of the same scale.
    assert abs((bottom - y1) - 2 * (bottom - y0)) < 0.2
    assert abs((bottom - y2) - 4 * (bottom - y0)) < 0.3
    (level,) = re.findall(
        r'stroke-dasharray="4 3" x1="\d+" x2="\d+" y1="([\d.]+)"', text
    )
    assert abs((bottom - float(level)) - 5 * (bottom - y0)) < 0.3


def test_a_scatter_joins_its_front_and_keeps_the_order_of_its_points() -> None:
    points = [
        ("dense <fp32>", 6.0, 82.0, 90.0),
        ("half", 3.0, 82.4, 20.0),
        ("small", 2.0, 80.6, 15.0),
    ]
    root = ElementTree.fromstring(
        scatter("Presets", "ms", "Spearman", points, front=["half", "small"])
    )
    space = "{http://www.w3.org/2000/svg}"
    circles = {
        (float(c.get("cx", "")), float(c.get("cy", "")), float(c.get("r", "")))
        for c in root.iter(f"{space}circle")
    }
    by_x = sorted(circles)
    assert [y for _, y, _ in by_x] != sorted(y for _, y, _ in by_x)
    (small, half, dense) = by_x
    assert half[1] < dense[1] < small[1]  # better is higher
    assert small[2] < half[2] < dense[2]  # larger files, larger points
    (line,) = root.iter(f"{space}polyline")
    assert line.get("points") == f"{small[0]},{small[1]} {half[0]},{half[1]}"
    assert "dense <fp32>" in {t.text for t in root.iter(f"{space}text")}
