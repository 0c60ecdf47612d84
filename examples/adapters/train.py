"""Train the two adapters that edgelm ships: `minilm-ner` and `minilm-similarity`.

    pip install 'edgelm[all]' peft scikit-learn
    python examples/adapters/train.py ner --data DATA --work WORK -o minilm-ner.safetensors
    python examples/adapters/train.py similarity --data DATA --work WORK -o minilm-similarity.safetensors

Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) of rank 32 on every linear layer of the
built-in model; the base weights stay as they are. An hour each on one core with bfloat16
instructions; each stage is kept in WORK and taken from there when the script runs again.

NER, in three stages: a teacher on the labelled sentences, with words masked and mentions exchanged for
others of their type; sentences of WikiText-2 on which that teacher, which sees no capitals, marks just
what the capitals mark; a student on both. Similarity, in three stages: a bi-encoder (CoSENT loss), which
learns faster from little data than a cross-encoder; the cross-encoder on pairs that the bi-encoder scores,
brought to the scale of the labels by isotonic regression; the cross-encoder on the labelled pairs.

DATA holds, as JSON lines (`tokens`, `tags` in BIO; `text1`, `text2`, `score` 0..5):

    wikigold/all.jsonl                          CC BY 4.0. The last fifth is held out.
    wnut17/{train,test}.jsonl                   CC BY 4.0. The test split is held out.
    crossner/DOMAIN/{train,dev,test}.jsonl      MIT. Of the test splits only politics is used, held out.
    stsb/{train,dev,test}.jsonl                 CC BY-SA 4.0. Pairs that are in the test split too are left out.
    wikitext2/train.txt                         CC BY-SA. Unlabelled.

The hyperparameters were chosen by the scores on wikigold's eighth tenth and STS-B's dev split, held out as
well; the adapters that are shipped are trained on those too, with what was chosen.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from ner import train_ner
from similarity import train_similarity
from training import save

TRAINERS = {"ner": train_ner, "similarity": train_similarity}


@click.command()
@click.argument("name", type=click.Choice(list(TRAINERS)))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option(
    "--work", type=click.Path(path_type=Path), required=True, help="For the stages."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    name: str, data: Path, work: Path, output: Path, seed: int, threads: int
) -> None:
    """Train an adapter; write it, and the held-out data to measure it with `edgelm eval`."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model, about = TRAINERS[name](data, work, seed)
    save(model, output, about)


if __name__ == "__main__":
    main()
