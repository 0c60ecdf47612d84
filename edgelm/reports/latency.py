"""A latency benchmark, for people: verdicts, plots with a table under them, the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgelm.reports.charts import bars, lines, number
from edgelm.reports.html import table
from edgelm.reports.profile import profile_section

# Column of a contender -> title, unit, which way is better.
_PLOTS = (
    ("p50_ms", "Latency of one text, median", "ms", "lower"),
    ("texts_per_s", "Throughput", "texts/s", "higher"),
    ("memory_mib", "Peak memory, proportional", "MiB", "lower"),
    ("size_mb", "Size on disk", "MB", "lower"),
    ("joules_per_text", "Energy a text, of the whole machine", "J", "lower"),
)
COLUMNS = (
    ("name", ""),
    ("runtime", "runtime"),
    ("precision", "precision"),
    ("p50_ms", "p50 ms"),
    ("p90_ms", "p90 ms"),
    ("p95_ms", "p95 ms"),
    ("p99_ms", "p99 ms"),
    ("texts_per_s", "texts/s"),
    ("cold_start_ms", "cold start ms"),
    ("memory_mib", "memory MiB"),
    ("size_mb", "size MB"),
    ("joules_per_text", "J a text"),
)


def latency_section(result: Mapping[str, Any]) -> str:
    """The part of a page that shows one benchmark, HTML.

    Args:
        result: What `benchmark` returned.
    """
    contenders, work = result["contenders"], result["workload"]
    plots = "".join(
        bars(title, unit, [(c["name"], c[key]) for c in contenders], better=better)
        for key, title, unit, better in _PLOTS
        if all(key in c for c in contenders)
    )
    threads = work["threads"] or "all"
    about = (
        f"{work['texts']} texts of {work['mean_characters']:.0f} characters on average; {work['rounds']} rounds, the "
        f"contenders in turn, each in its own process; {threads} threads. Latency is of one text at a time, "
        "tokenisation included; throughput of all texts in one call."
    )
    profile = result.get("profile")
    return (
        f'<h2>Side by side</h2><p class="note">{escape(about)}</p>{plots}'
        + table([t for _, t in contender_columns(result)], contender_rows(result))
        + _curve(contenders)
        + "".join(
            f"<h3>{escape(title)}</h3>{table(columns, rows)}"
            for title, columns, rows in extra_tables(result)
        )
        + ("" if profile is None else profile_section(profile))
    )


def machine_facts(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Where and when numbers were taken."""
    clock = environment["cpu_clock"]
    told = [f"governor {clock['governor']}"] if "governor" in clock else []
    told += [
        f"{clock[key]:.0f} MHz {word}"
        for key, word in (("now", "now"), ("least", "at least"), ("most", "at most"))
        if key in clock
    ]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    return [
        ("CPU", f"{environment['cpu']}, {environment['cores']} cores"),
        ("CPU clock", ", ".join(told) or "unknown"),
        ("System", environment["system"]),
        *(_device_facts(**environment["device"]) if "device" in environment else ()),
        ("Versions", versions),
        ("Measured", environment["measured_at"]),
    ]


def _curve(contenders: Sequence[Mapping[str, Any]]) -> str:
    """Throughput over the number of threads that call at once."""
    loads = contenders[0]["loads"]
    if not loads:
        return ""
    counts = [load["threads"] for load in loads]
    series = [(c["name"], [load["texts_per_s"] for load in c["loads"]]) for c in contenders]  # fmt: skip
    ends = (f"{counts[0]} at once", str(counts[-1]))
    steps = ", ".join(map(str, counts))
    note = f"Green: {contenders[0]['name']}. Grey: the others. Threads: {steps}."
    return (
        "<h3>Throughput against concurrency</h3>"
        f'<div class="panels">{lines("texts/s, one text a call", series, ends)}</div>'
        f'<p class="note">{escape(note)}</p>'
    )


def extra_tables(
    result: Mapping[str, Any],
) -> list[tuple[str, list[str], list[list[str]]]]:
    """What was measured beside: title, columns and rows of each table."""
    contenders = result["contenders"]
    found = []
    if contenders[0]["loads"]:
        rows = [
            [c["name"], str(load["threads"]), *(number(load[k]) for k in ("texts_per_s", "p50_ms", "p95_ms"))]
            for c in contenders
            for load in c["loads"]
        ]  # fmt: skip
        columns = ["", "threads that call", "texts/s", "p50 ms", "p95 ms"]
        found.append(("By concurrency", columns, rows))
    if contenders[0]["cells"]:
        rows = []
        for i, c in enumerate(contenders):
            for cell in c["cells"]:
                low, high = cell["interval"]
                ratio = f"{cell['ratio']:.2f} ({low:.2f} to {high:.2f})" if i else ""
                numbers = [number(cell[k]) for k in ("p50_ms", "p95_ms", "texts_per_s")]
                rows.append([c["name"], str(cell["length"]), str(cell["batch"]), *numbers, ratio])  # fmt: skip
        columns = ["", "tokens", "batch", "p50 ms", "p95 ms", "texts/s"]
        columns.append("the first's latency to this one's")
        found.append(("By length and batch size", columns, rows))
    return found


def verdicts(result: Mapping[str, Any]) -> list[str]:
    """One sentence for each comparison, and for what a reader must know."""
    first = result["contenders"][0]["name"]
    sentences = []
    for ratio, other in zip(result["ratios"], result["contenders"][1:], strict=True):
        low, high = ratio["throughput_interval"]
        slow, fast = ratio["latency_interval"]
        smaller = other["size_mb"] / result["contenders"][0]["size_mb"]
        sure = f"{100 * ratio['confidence']:.0f} % interval"
        sentences.append(
            f"{first} against {ratio['against']}: {ratio['throughput']:.2f} times the throughput "
            f"({sure} {low:.2f} to {high:.2f}), {ratio['latency']:.2f} times the latency "
            f"({slow:.2f} to {fast:.2f}), {smaller:.1f} times smaller."
        )
    if "recorded" in result:
        sentences.append(_recorded(first, result["recorded"]))
    for c in result["contenders"]:
        if not c["warm_up"]["steady"]:
            sentences.append(
                f"{c['name']} was not steady after {c['warm_up']['calls']} calls: the machine is busy or its clock "
                "moves. Trust the ratios, not the milliseconds."
            )
    return sentences


def _recorded(name: str, found: Mapping[str, Any]) -> str:
    """The comparison with an earlier benchmark in a sentence."""
    low, high = found["latency_range"]
    return (
        f"{name} against {found['against']} as recorded at {found['measured_at']}: {found['latency']:.2f} times the "
        f"latency ({low:.2f} to {high:.2f}), {found['throughput']:.2f} times the throughput; not measured in turns."
    )


def contender_columns(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Keys and titles of the table of contenders; nothing of what no machine told."""
    return [
        (key, title)
        for key, title in COLUMNS
        if any(key in c for c in result["contenders"])
    ]


def contender_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table of contenders."""
    return [
        [
            number(c[key]) if isinstance(c.get(key), float) else str(c.get(key, ""))
            for key, _ in contender_columns(result)
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
