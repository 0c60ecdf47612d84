"""The command compress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgelm.calibration import Calibration
from edgelm.cli.console import OUTPUT, TASKS, emit, progress_bar, say, show_table
from edgelm.cli.steps import (
    by_domain,
    experts_of,
    number,
    routed_steps,
    shrink_steps,
)


@click.command()
@click.argument("model", default="minilm")
@click.option("-o", "--output", type=OUTPUT, help="Folder of the checkpoint to make.")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    help="Recipe file (TOML), instead of the flags.",
)
@click.option(
    "--preset",
    type=click.Choice(["accurate", "balanced", "smallest"]),
    help="A recipe for all runtimes: three quarters, half or a quarter of the feed-forward neurons.",
)
@click.option("--sparsity", help="Fraction of zeros (0.5), or N of every M kept (2:4).")
@click.option(
    "--ffn-keep",
    metavar="SHARE",
    help="Share of feed-forward neurons that stay (0.5), alike in every block, "
    "or auto: shared out by what each block loses, under --budget.",
)
@click.option(
    "--experts",
    metavar="N",
    help="Judge whether routing each token to --active of N experts would do better than "
    "as many static neurons; the result is static unless --routed is given. auto: of 8, as many as --ffn-keep leaves.",
)
@click.option(
    "--active",
    type=int,
    metavar="K",
    help="With --experts: how many of them each token uses.",
)
@click.option(
    "--routed",
    is_flag=True,
    help="With --experts: keep the routed model, adapted as FactorLLM does, and say how far it and a static "
    "model of the same active width are from the dense one.",
)
@click.option(
    "--heads-keep",
    type=float,
    metavar="SHARE",
    help="Share of attention heads that stay (0.75).",
)
@click.option(
    "--budget",
    type=float,
    help="With --ffn-keep auto: share of all neurons that stay.  [default: 0.5]",
)
@click.option(
    "--saliency",
    type=click.Choice(["magnitude", "ria", "sparsegpt", "wanda"]),
    default="wanda",
    show_default=True,
    help="How weights are chosen.",
)
@click.option(
    "--refine",
    type=click.Choice(["none", "dsnot", "swaps", "admm", "auto"]),
    default="auto",
    show_default=True,
    help="What improves the choice; auto: for each layer what loses least.",
)
@click.option(
    "--repair",
    type=click.Choice(["none", "bias", "admm", "sparsegpt", "auto"]),
    default="auto",
    show_default=True,
    help="What makes up for the zeros: the bias, or new values for the weights left.",
)
@click.option(
    "--allocation",
    type=click.Choice(["uniform", "owl", "progressive"]),
    default="uniform",
    show_default=True,
    help="How a fraction of zeros is shared out among the blocks of the model.",
)
@click.option(
    "--permute",
    is_flag=True,
    help="Reorder the inner channels of feed-forward networks first, for N:M.",
)
@click.option(
    "--codes",
    "code_bits",
    type=int,
    metavar="BITS",
    help="Fit binary codes of this many bits (32 to 1024) to the embeddings; the bundle will carry them.",
)
@click.option(
    "--codes-kind",
    type=click.Choice(
        ["sign", "centred", "rotation", "itq", "projection", "autoencoder"]
    ),
    help="With --codes: how they are made.  [default: autoencoder]",
)
@click.option(
    "--vocab",
    metavar="FILE",
    help="Keep only the tokens that this text uses, and the pieces that spell any other text; "
    "auto: take the calibration text.",
)
@click.option(
    "--vocab-size",
    type=int,
    metavar="N",
    help="With --vocab: at most the N most frequent of the text's tokens.",
)
@click.option(
    "--skip",
    multiple=True,
    metavar="PART",
    help="Leave layers whose name contains PART dense; repeatable.",
)
@click.option(
    "--calibration",
    "texts",
    multiple=True,
    metavar="[NAME=]FILE",
    help="Texts to calibrate on: .txt or .jsonl, also .gz and .zst. With NAME= (repeatable, with --ffn-keep): "
    "the texts of a domain that gets neurons of its own.  [default: built-in]",
)
@click.option(
    "--max-texts",
    type=int,
    default=Calibration.max_texts,
    show_default=True,
    help="Calibrate on at most this many texts (the built-in sample has fewer).",
)
@click.option(
    "--max-tokens",
    type=int,
    default=Calibration.max_tokens,
    show_default=True,
    help="Cut calibration texts to this many tokens.",
)
@click.option(
    "--weighting",
    type=click.Choice(["auto", "text", "token", "entity"]),
    default="auto",
    show_default=True,
    help="How calibration text is weighted; auto: every text alike for embeddings, by entities for NER, else every "
    "token alike.",
)
@click.option("--task", type=TASKS, help="What the model is for.  [default: inferred]")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to compute.",
)
@click.option(
    "--spill",
    is_flag=True,
    help="Keep the texts' hidden states on disk, beside the output, not in memory.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the draw of calibration texts.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the resolved recipe (TOML, or with --json JSON) and stop.",
)
@click.option(
    "--force", is_flag=True, help="Replace a checkpoint that is there already."
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print the report as JSON lines on stdout."
)
def compress(
    model: str,
    output: Path | None,
    recipe_file: Path | None,
    preset: str | None,
    sparsity: str | None,
    ffn_keep: str | None,
    experts: str | None,
    active: int | None,
    routed: bool,
    heads_keep: float | None,
    budget: float | None,
    saliency: str,
    refine: str,
    repair: str,
    allocation: str,
    permute: bool,
    code_bits: int | None,
    codes_kind: str | None,
    vocab: str | None,
    vocab_size: int | None,
    skip: tuple[str, ...],
    texts: tuple[str, ...],
    max_texts: int,
    max_tokens: int,
    weighting: str,
    task: Any,
    device: str,
    spill: bool,
    seed: int,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Make MODEL smaller: a checkpoint that transformers loads.

    MODEL is a built-in name (minilm, minilm-ner, minilm-similarity), a folder or a
    hub id.

    \b
    edgelm compress minilm -o small --sparsity 2:4 --refine dsnot
    """
    from edgelm import recipe as recipes
    from edgelm.checkpoint import PAGE
    from edgelm.compress.distributed import rank
    from edgelm.pipeline import compress_model
    from edgelm.reports.compression import (
        COLUMNS,
        codes_sentence,
        layer_rows,
        routing_sentence,
        size_sentence,
        verdict,
    )

    judged, ffn_keep = experts_of(experts, active, ffn_keep)
    if preset is not None:
        if ffn_keep is not None:
            raise click.UsageError(
                "--preset says how many neurons stay; leave --ffn-keep and --experts out."
            )
        ffn_keep = str(recipes.PRESETS[preset])
    domains, general = by_domain(texts)
    if domains:
        if ffn_keep in (None, "auto") or judged or sparsity or code_bits:
            raise click.UsageError(
                "--calibration NAME=FILE goes with --ffn-keep SHARE or --preset, and is the last step: "
                "leave --experts, --sparsity and --codes out."
            )
        keep, ffn_keep = number(str(ffn_keep)), None
    more = bool(sparsity or code_bits or domains)
    last = routed_steps(routed, judged, active, ffn_keep, more)
    if last:
        ffn_keep, judged = None, 0
    steps = [*shrink_steps(ffn_keep, judged, heads_keep, budget, skip), *last]
    if domains:
        shared = keep / 2 if isinstance(keep, float) else keep
        part = {"texts": domains, "keep": keep, "shared": shared}
        steps.append({"method": "domains", **part})
    if sparsity is not None:
        steps.append(
            {
                "method": "sparsify",
                "sparsity": sparsity if ":" in sparsity else number(sparsity),
                "saliency": saliency,
                "refine": refine,
                "repair": repair,
                "allocation": allocation,
                "permute": permute,
                "skip": skip,
            }
        )
    if code_bits is not None:
        kind = {} if codes_kind is None else {"kind": codes_kind}
        steps.append({"method": "codes", "bits": code_bits, **kind})
    elif codes_kind is not None:
        raise click.UsageError("--codes-kind goes with --codes BITS.")
    if vocab_size is not None and vocab is None:
        raise click.UsageError("--vocab-size goes with --vocab FILE or --vocab auto.")
    if recipe_file is not None and (steps or vocab):
        raise click.UsageError("Give --recipe or what to do by flags, not both.")
    if recipe_file is None:
        if not (steps or vocab):
            raise click.UsageError(
                "Say what to do: --preset balanced, --ffn-keep 0.5, --sparsity 0.5, --sparsity 2:4, "
                "--codes 256, --vocab auto, or --recipe FILE."
            )
        calibration = {
            "texts": general,
            "max_texts": max_texts,
            "max_tokens": max_tokens,
            "weighting": weighting,
            "seed": seed,
        }
        data: dict[str, Any] = {"calibration": calibration, "steps": steps}
        if vocab is not None:
            size = {} if vocab_size is None else {"size": vocab_size}
            data["vocabulary"] = {"texts": vocab, **size}
        recipe = recipes.parse_recipe(data, "The command line")
    else:
        recipe = recipes.read_recipe(recipe_file)
    if dry_run:
        if as_json:
            emit(recipes.to_plain(recipe))
        else:
            click.echo(recipes.to_toml(recipe), nl=False)
        return
    if output is None:
        raise click.UsageError("Say where to write the checkpoint: -o FOLDER.")
    with progress_bar(f"compressing {model}") as update:
        try:
            report = compress_model(
                model,
                recipe,
                output,
                task=task,
                device=device,
                spill=spill,
                force=force,
                progress=update,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                "The same command goes on where this one stopped."
            ) from None
    if rank() > 0:
        return  # the first process speaks for all
    if as_json:
        for row in report.layers:
            emit(row)
        if report.codes is not None:
            emit({"codes": dict(report.codes)})
        if report.routing is not None:
            emit({"routing": dict(report.routing)})
    elif report.layers:
        show_table(
            "Relative output error by layer, on held-out text",
            COLUMNS,
            layer_rows(report.layers),
        )
    if judgement := verdict(report.layers):
        say(judgement)
    if report.codes is not None:
        say(codes_sentence(report.codes))
    if report.routing is not None:
        say(routing_sentence(report.routing))
    cost = report.cost
    say(
        f"{output}: {model} in {cost['seconds']:.0f} s, calibrated on {cost['texts']} texts ({cost['tokens']} tokens)"
    )
    if report.vocabulary is not None:
        kept, of = report.vocabulary
        say(f"{kept} of {of} tokens are left.")
    say(f"{size_sentence(report.layers)} All of it: {output / PAGE}".strip())


COMMANDS = {"compress": compress}
