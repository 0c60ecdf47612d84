"""Whether routing feed-forward networks pays: each layer's error, static and routed, at equal active width.

    python benchmarks/factorize.py --model minilm -o minilm.json
    python benchmarks/factorize.py --model lm --task lm --calibration wikitext2/train.txt -o lm.json

Every network gets the inputs that it has in the dense model; of the calibration texts, every eighth is
held out to judge by. See `edgelm.compress.judge` for the contenders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from edgelm import layers
from edgelm.calibration import Batch, Calibration, load_texts, split
from edgelm.compress.judge import Tokens, judge
from edgelm.models import LoadedModel, load_model
from edgelm.pipeline import calibration_batches
from edgelm.reports.compression import pays


def tokens_of(
    loaded: LoadedModel, batches: list[Batch], limit: int
) -> dict[str, Tokens]:
    """Inputs of every network and of its projection, for so many tokens of the batches."""
    where = layers.architecture(loaded.model.config.model_type)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, key=f"{path} {name}": seen.setdefault(key, []).append(
                args[0].flatten(0, -2)[real]
            )
        )
        for path, block in layers.blocks(loaded.model)
        for name in (where.ffn_in[0], where.ffn_out)
    ]
    count = 0
    for batch in batches:
        real = batch.attention_mask.flatten().bool()
        loaded.model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        )
        count += int(real.sum())
        if count >= limit:
            break
    for handle in handles:
        handle.remove()
    return {
        path: Tokens(
            *(
                torch.cat(seen[f"{path} {name}"])[:limit]
                for name in (where.ffn_in[0], where.ffn_out)
            )
        )
        for path, _ in layers.blocks(loaded.model)
    }


@click.command()
@click.option("--model", default="minilm", show_default=True)
@click.option("--task", help="Of the model; else inferred.")
@click.option("--calibration", default="built-in", show_default=True)
@click.option(
    "--amounts", default="8:6,8:4,8:2", show_default=True, help="EXPERTS:ACTIVE, by ,"
)
@click.option("--tokens", default=16384, show_default=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
def main(
    model: str,
    task: Any,
    calibration: str,
    amounts: str,
    tokens: int,
    output: Path,
) -> None:
    """Judge every network; print a table, write JSON."""
    torch.set_grad_enabled(False)
    loaded = load_model(model, task)
    settled = Calibration(texts=calibration, max_texts=4096)
    parts = [
        calibration_batches(loaded, part, settled)
        for part in split(load_texts(settled))
    ]
    fit, held_out = (tokens_of(loaded, part, tokens) for part in parts)
    where = layers.architecture(loaded.model.config.model_type)
    rows: list[dict[str, Any]] = []
    for amount in amounts.split(","):
        experts, active = map(int, amount.split(":"))
        for path, block in layers.blocks(loaded.model):
            w2 = layers.weight_matrix(block.get_submodule(where.ffn_out))
            errors = judge(
                w2, fit[path], held_out[path], experts=experts, active=active
            )
            rows.append({"amount": amount, "block": path, **errors})
            shown = "  ".join(f"{k} {100 * v:6.2f} %" for k, v in errors.items())
            verdict = "routing pays" if pays(errors) else "static"
            click.echo(f"{amount:5} {path:20} {shown}   {verdict}")
            output.write_text(
                json.dumps({"model": model, "rows": rows}, indent=1) + "\n"
            )


if __name__ == "__main__":
    main()
