"""The page of a latency benchmark: verdicts, plots with a table under them, provenance."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from edgelm.reports.charts import bars, number
from edgelm.reports.html import fact_list, page, table
from edgelm.reports.profile import profile_section

# Column of a contender -> title, unit, which way is better.
_PLOTS = (
    ("p50_ms", "Latency of one text, median", "ms", "lower"),
    ("texts_per_s", "Throughput", "texts/s", "higher"),
    ("memory_mib", "Peak memory, proportional", "MiB", "lower"),
    ("size_mb", "Size on disk", "MB", "lower"),
)
COLUMNS = (
    ("name", ""),
    ("runtime", "runtime"),
    ("precision", "precision"),
    ("p50_ms", "p50 ms"),
    ("p95_ms", "p95 ms"),
    ("p99_ms", "p99 ms"),
    ("texts_per_s", "texts/s"),
    ("cold_start_ms", "cold start ms"),
    ("memory_mib", "memory MiB"),
    ("size_mb", "size MB"),
)


def latency_page(result: Mapping[str, Any]) -> str:
    """The page of one benchmark.

    Args:
        result: What `benchmark` returned.

    Returns:
        HTML without any reference to a network.
    """
    contenders = result["contenders"]
    plots = "".join(
        bars(title, unit, [(c["name"], c[key]) for c in contenders], better=better)
        for key, title, unit, better in _PLOTS
    )
    work, environment = result["workload"], result["environment"]
    threads = work["threads"] or "all"
    about = (
        f"{work['texts']} texts of {work['mean_characters']:.0f} characters on average; {work['rounds']} rounds, the "
        f"contenders in turn, each in its own process; {threads} threads. Latency is of one text at a time, "
        "tokenisation included; throughput of all texts in one call."
    )
    facts = [
        ("CPU", f"{environment['cpu']}, {environment['cores']} cores"),
        ("System", environment["system"]),
        *_device_facts(**environment["device"]),
        ("Versions", ", ".join(f"{k} {v}" for k, v in environment["versions"].items())),
        ("Measured", environment["measured_at"]),
    ]
    profile = result.get("profile")
    return page(
        f"{contenders[0]['name']}: latency",
        "".join(f'<p class="verdict">{escape(v)}</p>' for v in verdicts(result))
        + f'<p class="note">{escape(about)}</p>'
        + f"<h2>Side by side</h2>{plots}"
        + table([title for _, title in COLUMNS], contender_rows(result))
        + ("" if profile is None else profile_section(profile))
        + f"<h2>Environment</h2>{fact_list(facts)}",
    )


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """One sentence for each comparison."""
    first = result["contenders"][0]["name"]
    sentences = []
    for ratio, other in zip(result["ratios"], result["contenders"][1:], strict=True):
        low, high = ratio["throughput_range"]
        slow, fast = ratio["latency_range"]
        smaller = other["size_mb"] / result["contenders"][0]["size_mb"]
        sentences.append(
            f"{first} against {ratio['against']}: {ratio['throughput']:.2f} times the throughput "
            f"({low:.2f} to {high:.2f} by round), {ratio['latency']:.2f} times the latency "
            f"({slow:.2f} to {fast:.2f}), {smaller:.1f} times smaller."
        )
    return sentences


def contender_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of contenders."""
    return [
        [
            number(c[key]) if isinstance(c[key], float) else str(c[key])
            for key, _ in COLUMNS
        ]
        for c in result["contenders"]
    ]


def _device_facts(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What a device told of its state; nothing of what it does not tell."""
    facts = []
    if "power_mode_id" in after:
        name = after.get("power_mode", "unnamed")
        facts.append(("Power mode", f"{name} ({after['power_mode_id']})"))
    if "gpu_clock" in after:
        clock = after["gpu_clock"]
        was = before.get("gpu_clock", clock)["now"]
        text = f"{was:.0f} MHz before, {clock['now']:.0f} after, between {clock['least']:.0f} and {clock['most']:.0f}"
        facts.append(("GPU clock", text))
    zones = after["temperatures_c"]
    if zones:
        were = before["temperatures_c"]
        text = ", ".join(
            f"{zone} {were.get(zone, now):.1f} to {now:.1f}"
            for zone, now in zones.items()
        )
        facts.append(("Temperatures, °C", text))
    return facts
