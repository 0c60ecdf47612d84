"""Train a small LLaMA-architecture language model from scratch: a measuring instrument, not a product.

    python examples/train_lm.py --data DATA -o lm --minutes 15

About 5 million parameters on a CPU (30 million on a GPU), for the perplexity rows of
`benchmarks/quality.py`. DATA holds plain text: `wikitext2/train.txt` (CC BY-SA) and
`gutenberg/train.txt` (public domain in the US). A byte-pair tokenizer of 8,192 tokens is trained first, on
the same text; neither ever sees a test split.
"""

from __future__ import annotations

import time
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 256
END = "<|end|>"
SIZES = {
    "cpu": {
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
    },
    "cuda": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
}


def make_tokenizer(files: list[Path]) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8192, special_tokens=[END], initial_alphabet=alphabet
    )
    tokenizer.train([str(file) for file in files], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    )


def read_tokens(
    files: list[Path], tokenizer: PreTrainedTokenizerFast, megabytes: float
) -> torch.Tensor:
    """All tokens of the files' beginnings, one behind the other."""
    parts = []
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")[
            : int(megabytes * 1e6)
        ]
        lines = text.split("\n")
        for i in range(0, len(lines), 20000):
            encodings = tokenizer.backend_tokenizer.encode_batch(lines[i : i + 20000])
            parts += [
                torch.tensor(e.ids, dtype=torch.int32) for e in encodings if e.ids
            ]
    return torch.cat(parts)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option(
    "--minutes",
    default=15.0,
    show_default=True,
    help="Of training, tokenising excluded.",
)
@click.option("--seed", default=0, show_default=True)
def main(data: Path, output: Path, minutes: float, seed: int) -> None:
    """Train; the rate falls to zero as the time runs out."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [data / "wikitext2" / "train.txt", data / "gutenberg" / "train.txt"]
    tokenizer = make_tokenizer(files)
    tokens = read_tokens(files, tokenizer, 12 if device == "cpu" else 50)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[device],
    )
    model = LlamaForCausalLM(config).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    click.echo(
        f"{parameters / 1e6:.1f} million parameters, {len(tokens) / 1e6:.1f} million tokens, on {device}"
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, weight_decay=0.05, betas=(0.9, 0.95)
    )
    rows = 16 if device == "cpu" else 64
    began, step = time.monotonic(), 0
    while (gone := (time.monotonic() - began) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100, (1 - gone) / 0.7)
        starts = torch.randint(len(tokens) - CONTEXT, (rows,))
        batch = (
            torch.stack([tokens[i : i + CONTEXT] for i in starts.tolist()])
            .long()
            .to(device)
        )
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            click.echo(f"step {step}, {100 * gone:.0f} %: loss {loss.item():.3f}")
        step += 1
    model.eval().cpu().float().save_pretrained(output)
    tokenizer.save_pretrained(output)
    click.echo(
        f"{output}: {step} steps of {rows * CONTEXT} tokens, last loss {loss.item():.3f}"
    )


if __name__ == "__main__":
    main()
