"""The page of a compression: what each layer lost, by what it was mended, what it weighs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from edgelm.reports.charts import lines
from edgelm.reports.html import fact_list, page, table

COLUMNS = (
    "layer",
    "shape",
    "zeros %",
    "first mask %",
    "refined %",
    "final %",
    "by",
    "seconds",
)


# A routed error above this share of the static one does not pay for the dispatch.
_WORTH = 0.8


def compression_page(about: Mapping[str, Any]) -> str:
    """The page of one compression.

    Args:
        about: What a checkpoint's `edgelm.json` holds.

    Returns:
        HTML without any reference to a network.
    """
    rows, model = about["report"], about["model"]
    cost = about["cost"]
    facts = [
        (
            "Model",
            f"{model['name']}, SHA-256 of its weights {model['source_digest'][:16]}…",
        ),
        ("Calibrated on", f"{cost['texts']} texts, {cost['tokens']} tokens"),
        ("Time", f"{cost['seconds']:.0f} s, {cost['peak_mib']:.0f} MiB at most"),
        ("Made by", about["created_by"]),
    ]
    return page(
        f"{model['name']}: compression",
        f'<p class="verdict">{escape(size_sentence(rows))}</p>'
        '<p class="note">Errors are of each layer\'s output on calibration text that was held out: the mean '
        "square of the error over that of the output, in percent. They are not the model's quality: "
        "measure that with <code>edgelm eval</code> on data of its task.</p>"
        f"{layers_section(about)}"
        "<h2>Recipe</h2>"
        f'<pre class="scroll">{escape(json.dumps(about["recipe"], indent=1))}</pre>'
        f"<h2>Where from</h2>{fact_list(facts)}",
    )


def layers_section(about: Mapping[str, Any]) -> str:
    """What each layer lost, step by step; the routed experts; the codes."""
    parts = _routing(about.get("routing")), _codes(about.get("codes"))
    return f"{_steps(about['report'])}{''.join(parts)}"


def sizes(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes of the layers after the last step, stored in three ways."""
    last = max(row["step"] for row in rows)
    ways = rows[0]["bytes"]
    return {
        way: sum(r["bytes"][way] for r in rows if r["step"] == last) for way in ways
    }


def size_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the layers weigh; zeros alone make no file smaller."""
    if not rows:
        return "The weights are as they were."
    total = sizes(rows)
    dense, mask, packed = (total[way] / 1e6 for way in ("dense", "bitmask", "zstd"))
    return (
        f"The compressed layers take {dense:.1f} MB as they lie in the checkpoint, {mask:.1f} MB as a bit mask "
        f"and the weights that are left, {packed:.1f} MB under zstd."
    )


def codes_sentence(about: Mapping[str, Any]) -> str:
    """What a checkpoint's codes are and what they keep of a float search."""
    what = f"Codes of {about['bits']} bits ({about['kind']}), fitted in {about['seconds']:.1f} s."
    found = about.get("held_out")
    if found is None:
        return what
    hamming, floats, rescored = (
        f"{100 * found[key]:.0f} %" for key in ("hamming", "asymmetric", "rescored")
    )
    return (
        f"{what} Of the ten nearest texts by float search, held-out texts find {hamming} by Hamming distance, "
        f"{floats} with float queries, and {rescored} with the best 40 rescored."
    )


def routing_sentence(about: Mapping[str, Any]) -> str:
    """How far a routed model is from the dense one, and a static one of the same active width."""
    errors = about["errors"]
    return (
        f"Each token uses {about['active']} of {about['experts']} experts. Variance of the last hidden states that is "
        f"lost on held-out text: {100 * errors['routed']:.3g} % by the routed model, {100 * errors['static']:.3g} % by "
        "a static one of the same active width."
    )


def _routing(about: Mapping[str, Any] | None) -> str:
    return (
        ""
        if about is None
        else f"<h2>Routed experts</h2><p>{escape(routing_sentence(about))}</p>"
    )


def _codes(about: Mapping[str, Any] | None) -> str:
    return (
        "" if about is None else f"<h2>Codes</h2><p>{escape(codes_sentence(about))}</p>"
    )


def layer_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Rows of the table of layers."""
    return [
        [
            row["layer"],
            "x".join(map(str, row["shape"])),
            f"{100 * row['sparsity']:.1f}",
            *(
                f"{100 * row[key]:.2f}"
                for key in ("error_initial", "error_mask", "error")
            ),
            f"{row['refine']}, {row['repair']}",
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the judge found, over the rows of a compression's report; empty if not asked."""
    judged = [row for row in rows if "closed form" in row["tried"]]
    if not judged:
        return ""
    paying = [row["layer"] for row in judged if pays(row["tried"])]
    if not paying:
        return (
            "Routing does not pay: in no network is a closed-form router's error below "
            f"{_WORTH:g} of the static one's at equal active width. The result is static."
        )
    return (
        f"Routing would leave a clearly smaller error in {len(paying)} of {len(judged)} networks "
        f"({', '.join(paying)}). The result is static; --routed keeps FactorLLM's routed model instead."
    )


def pays(errors: Mapping[str, float]) -> bool:
    """Whether the closed-form router is enough better than the static network."""
    return errors["closed form"] < _WORTH * errors["static"]


def _steps(rows: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted({row["step"] for row in rows})
    parts = []
    for step in numbers:
        of_step = [row for row in rows if row["step"] == step]
        title = (
            "Error by layer"
            if len(numbers) == 1
            else f"Step {step + 1}: error by layer"
        )
        panels = "".join(
            lines(
                f"{name}, %",
                [
                    (label, [100 * row[key] for row in kind])
                    for label, key in (
                        ("final", "error"),
                        ("first mask", "error_initial"),
                    )
                ],
            )
            for name, kind in _by_kind(of_step).items()
        )
        parts.append(
            f'<h2>{title}</h2><p class="note">Green: final. Grey: with the first mask.</p>'
            f'<div class="panels">{panels}</div>{table(COLUMNS, layer_rows(of_step))}'
            f"{_judgement(of_step)}"
        )
    return "".join(parts)


def _judgement(rows: Sequence[Mapping[str, Any]]) -> str:
    """Routed against static networks, where that was asked for."""
    sentence = verdict(rows)
    if not sentence:
        return ""
    ways = ("static", "oracle", "closed form", "FactorLLM")
    judged = [row for row in rows if "closed form" in row["tried"]]
    panels = lines(
        "error at equal active width, %",
        [
            (way, [100 * row["tried"][way] for row in judged])
            for way in ("static", "closed form")
        ],
    )
    cells = [
        [row["layer"], *(f"{100 * row['tried'][way]:.2f}" for way in ways)]
        for row in judged
    ]
    return (
        f'<h2>Would routing do better?</h2><p class="verdict">{escape(sentence)}</p>'
        '<p class="note">Variance of each network\'s output that is lost, on held-out text, in percent. The '
        "oracle knows each token's best experts. Green: static. Grey: closed-form routing.</p>"
        f'<div class="panels">{panels}</div>{table(("network", *ways), cells)}'
    )


def _by_kind(
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, list[Mapping[str, Any]]]:
    """Rows by the layer's name within its block."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        parts = row["layer"].split(".")
        behind = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
        kinds.setdefault(".".join(parts[behind + 1 :]), []).append(row)
    return kinds
