"""What the flags of `edgelm compress` ask for, as steps of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


def experts_of(
    experts: str | None, active: int | None, ffn_keep: str | None
) -> tuple[int, str | None]:
    """How many experts to judge by, 0 for none, and the share of neurons that stays."""
    if experts is None and active is None:
        return 0, ffn_keep
    if experts == "auto":
        keep = number(ffn_keep or "0.5")
        if active is not None or not isinstance(keep, float) or keep * 8 % 1:
            raise click.UsageError(
                "Give --experts auto without --active, and with --ffn-keep in eighths, such as 0.5."
            )
        return 8, str(keep)
    if not (experts or "").isdecimal() or not int(experts or 0) or not active:
        raise click.UsageError(
            "Give --experts N with --active K, both at least 1, or --experts auto."
        )
    if ffn_keep is not None:
        raise click.UsageError(
            "--experts N --active K says what stays: leave --ffn-keep out."
        )
    return int(experts or 0), str(active / int(experts or 0))


def shrink_steps(
    ffn_keep: str | None,
    experts: int,
    heads_keep: float | None,
    budget: float | None,
    skip: tuple[str, ...],
) -> list[dict[str, Any]]:
    """The steps that flags ask for: heads first, so that neurons make up for them."""
    if budget is not None and ffn_keep != "auto":
        raise click.UsageError("--budget goes with --ffn-keep auto.")
    steps: list[dict[str, Any]] = []
    if heads_keep is not None:
        steps.append({"part": "heads", "keep": heads_keep})
    if ffn_keep == "auto":
        keep = 0.5 if budget is None else budget
        steps.append({"part": "neurons", "keep": keep, "allocation": "auto"})
    elif ffn_keep is not None:
        keep_alike = number(ffn_keep)
        steps.append({"part": "neurons", "keep": keep_alike, "experts": experts})
    return [{"method": "shrink", "skip": skip, **step} for step in steps]


def routed_steps(
    routed: bool, experts: int, active: int | None, keep: str | None, more: bool
) -> list[dict[str, Any]]:
    """FactorLLM as a step, where the routed model is to be kept.

    Args:
        routed: Whether it is.
        experts: What `experts_of` found.
        active: How many are active; None: the share ``keep``.
        keep: What `experts_of` found.
        more: Whether other steps were asked for that would have to come behind it.
    """
    if not routed:
        return []
    if not experts or more:
        raise click.UsageError(
            "--routed goes with --experts N --active K or --experts auto, and is the last step: "
            "leave --sparsity, --codes and --calibration NAME=FILE out."
        )
    count = round(experts * float(keep or 0)) if active is None else active
    return [{"method": "factorllm", "experts": experts, "active": count}]


def by_domain(texts: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """Files by domain, and the one of no domain."""
    domains: dict[str, str] = {}
    general = []
    for text in texts:
        name, sign, file = text.partition("=")
        if not sign or Path(text).exists():
            general.append(text)
        elif domains.setdefault(name, file) != file:
            raise click.UsageError(f"--calibration names the domain {name} twice.")
    if len(general) > 1:
        raise click.UsageError("Give --calibration FILE once, or NAME=FILE.")
    return domains, (general or ["built-in"])[0]


def number(text: str) -> float | str:
    """A number where it is one; what it may be is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        return text
