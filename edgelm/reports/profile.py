"""Where the time goes, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html import escape
from typing import Any

from edgelm.reports.charts import bars, number
from edgelm.reports.html import table

GROUPS = ("operators", "ms a text", "share %")
_SHAPES = ("inputs", "outputs", "count", "int8 GOP/s", "float GOP/s")


def group_rows(profile: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of groups."""
    return [
        [g["name"], f"{g['ms_a_text']:.3f}", f"{100 * g['share']:.1f}"]
        for g in profile["groups"]
    ]


def sentences(profile: Mapping[str, Any]) -> list[str]:
    """What the numbers say, a sentence each."""
    said = [
        f"{profile['texts_per_s']:.0f} texts a second while recorded, with one worker. Where the runtime joins a "
        "product and the quantising of its input, both count as the product; what is unaccounted is batching, and "
        "the runtime between its operators."
    ]
    if other := profile["other"]:
        kinds = Counter(entry["operator"] or entry["node"] for entry in other)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(8))
        said.append(f"Not recognised, and so other: {listed}.")
    if products := profile["products"]:
        said += [
            f"The products of attention and FFN take {products['gop_a_text']:.2f} GOP a text, padding included, "
            f"and run at {products['gops']:.0f} GOP/s: {100 * products['share_of_ceiling']:.0f} % of the "
            f"{products['ceiling_gops']:.0f} GOP/s that the same shapes reach here alone "
            f"(int8 {products['int8_ceiling_gops']:.0f}, float {products['float_ceiling_gops']:.0f}).",
            f"With nothing but these products, at that rate, it would be {products['texts_per_s_at_ceiling']:.0f} "
            "texts a second.",
        ]
    return said


def profile_section(profile: Mapping[str, Any]) -> str:
    """A part of the page of a benchmark, HTML."""
    shares = [(g["name"], 100 * g["share"]) for g in profile["groups"]]
    shares.sort(key=lambda row: -row[1])
    parts = [
        "<h2>Where the time goes</h2>",
        *(f"<p>{escape(sentence)}</p>" for sentence in sentences(profile)),
        bars("Share of the time", "%", shares),
        table(GROUPS, group_rows(profile)),
    ]
    if products := profile["products"]:
        rates = [
            ("as the model runs", products["gops"]),
            ("alone, as stored", products["ceiling_gops"]),
            ("alone, int8", products["int8_ceiling_gops"]),
            ("alone, float", products["float_ceiling_gops"]),
        ]
        rows = [
            [
                *(str(shape[key]) for key in ("inputs", "outputs", "count")),
                *(number(shape[key]) for key in ("int8_gops", "float_gops")),
            ]
            for shape in products["shapes"]
        ]
        parts += [
            bars("Matrix products", "GOP/s", rates, better="higher"),
            table(_SHAPES, rows),
        ]
    if other := profile["other"]:
        rows = [
            [entry["node"], entry["operator"], f"{100 * entry['share']:.2f}"]
            for entry in other
        ]
        parts.append(table(("other: node", "operator", "share %"), rows))
    return "".join(parts)
