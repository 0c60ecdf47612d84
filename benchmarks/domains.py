"""How near models stay to the dense one on texts of some domains: mean cosine of their vectors.

    edgelm compress minilm -o experts --ffn-keep 0.5 --max-texts 256 --max-tokens 128 \\
        --calibration science=science.jsonl --calibration news=news.jsonl
    python benchmarks/domains.py --model experts --model experts:science --model experts:news \\
        --data science=science-test.jsonl --data news=news-test.jsonl

A model is a reference, behind a colon the domain to load. The texts are .txt or .jsonl; they must be others than
those calibrated on.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click
import torch

from edgelm.calibration import make_batches, read_texts
from edgelm.export.modules import wrap
from edgelm.models import LoadedModel, load_model


def vectors(loaded: LoadedModel, texts: list[str], max_tokens: int) -> torch.Tensor:
    """Embeddings of unit length, in an order that depends on the texts alone."""
    module = wrap(loaded)
    found = [
        module(b.input_ids, b.attention_mask, b.token_type_ids)
        for b in make_batches(texts, loaded.tokenizer, max_tokens)
    ]
    return torch.nn.functional.normalize(torch.cat(found), dim=1)


@click.command()
@click.option("--model", "models", multiple=True, required=True)
@click.option("--data", multiple=True, required=True, help="NAME=FILE; repeatable.")
@click.option("--dense", default="minilm", show_default=True)
@click.option("--count", default=100, show_default=True, help="Texts of each file.")
@click.option("--max-tokens", default=128, show_default=True)
def main(
    models: tuple[str, ...],
    data: tuple[str, ...],
    dense: str,
    count: int,
    max_tokens: int,
) -> None:
    """Measure; print a table."""
    torch.set_grad_enabled(False)
    named = dict(d.split("=", 1) for d in data)
    texts = {n: list(islice(read_texts(Path(f)), count)) for n, f in named.items()}
    original = load_model(dense)
    due = {n: vectors(original, t, max_tokens) for n, t in texts.items()}
    click.echo(f"| model | {' | '.join(named)} |\n|---{'|---' * len(named)}|")
    for model in models:
        reference, _, domain = model.partition(":")
        loaded = load_model(reference, domain=domain or None)
        cosines = [
            float((vectors(loaded, t, max_tokens) * due[n]).sum(dim=1).mean())
            for n, t in texts.items()
        ]
        click.echo(f"| {model} | {' | '.join(f'{c:.3f}' for c in cosines)} |")


if __name__ == "__main__":
    main()
