"""Calibration: texts to token batches to statistics of the layers' inputs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgelm import samples
from edgelm.errors import ConfigError, InputError
from edgelm.lines import numbered_json_lines, numbered_lines, open_binary

if TYPE_CHECKING:
    import torch

BUILT_IN = "built-in"


@dataclass(frozen=True)
class Calibration:
    """Which text the statistics are taken from.

    Attributes:
        texts: ``built-in`` (the sample that edgelm ships), or a file: ``.txt`` (a
            text a line) or ``.jsonl`` (field ``text``), plain or ``.gz`` or ``.zst``.
        max_texts: Use at most this many, drawn at random by ``seed``.
        max_tokens: Cut each text to this many tokens.
        weighting: What counts in the statistics: each ``token`` alike; each ``text``
            alike (its tokens count 1 / length), so that long texts do not own them; or,
            for NER, tokens by how likely the model finds an ``entity`` there
            (`edgelm.compress.weighting`). ``auto`` is ``text`` for embeddings, where
            the text is the unit, ``entity`` for NER, else ``token``.
        seed: Of the draw.
    """

    texts: str = BUILT_IN
    max_texts: int = 2048
    max_tokens: int = 256
    weighting: Literal["auto", "text", "token", "entity"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name in ("max_texts", "max_tokens"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(
                    f"The '{name}' parameter of Calibration must be at least 1. Got {value} instead."
                )


@dataclass(frozen=True)
class Batch:
    """Token ids of several texts, padded.

    Attributes:
        input_ids: int64 ``[batch, sequence]``.
        attention_mask: int64 ``[batch, sequence]``; 1 for a token, 0 for padding.
        token_type_ids: int64 ``[batch, sequence]``, where the model takes them.
        token_weights: float32 ``[batch, sequence]``, 0 for padding; None: all alike.
        domain: Which domain's text it is; empty for none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor | None = None
    token_weights: torch.Tensor | None = None
    domain: str = ""

    @property
    def weights(self) -> torch.Tensor:
        """What each token counts in statistics, float32 ``[batch, sequence]``."""
        if self.token_weights is None:
            return self.attention_mask.float()
        return self.token_weights


def load_texts(calibration: Calibration) -> list[str]:
    """Read the texts that a calibration names.

    A file is streamed; only the drawn texts stay in memory (reservoir sampling,
    Vitter 1985, algorithm R).

    Returns:
        At most ``max_texts`` texts, none empty, in the order of the file.

    Raises:
        InputError: The file cannot be read, or holds no text.
    """
    if calibration.texts == BUILT_IN:
        source: Iterable[str] = samples.calibration()
    else:
        source = read_texts(Path(calibration.texts))
    draw = random.Random(calibration.seed)
    kept: list[tuple[int, str]] = []
    for i, text in enumerate(text for text in source if text.strip()):
        if len(kept) < calibration.max_texts:
            kept.append((i, text))
        elif (j := draw.randrange(i + 1)) < calibration.max_texts:
            kept[j] = (i, text)
    if not kept:
        raise InputError(
            f"The calibration file {calibration.texts} holds no text. "
            'Give one text a line, or JSON lines with the field "text".'
        )
    return [text for _, text in sorted(kept)]


def read_texts(path: Path) -> Iterator[str]:
    """Stream the texts of a file.

    Args:
        path: ``.txt`` or ``.jsonl`` (``.json`` lines too), plain or ``.gz`` or ``.zst``.

    Raises:
        InputError: The file cannot be read; the message names the line.
    """
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    with open_binary(path) as stream:
        if name.endswith((".jsonl", ".json", ".ndjson")):
            for number, row in numbered_json_lines(stream, str(path)):
                text = row.get("text") if isinstance(row, dict) else None
                if not isinstance(text, str):
                    raise InputError(
                        f'{path}, line {number}: there is no string field "text".'
                    )
                yield text
        else:
            for _, line in numbered_lines(stream, str(path)):
                yield line


def split(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts to compute with and texts to judge by: every eighth.

    Where there are fewer than sixteen, both are all of them.
    """
    if len(texts) < 16:
        return list(texts), list(texts)
    return [t for i, t in enumerate(texts) if i % 8], list(texts[::8])


def text_digest(texts: Iterable[str]) -> str:
    """SHA-256 (hex) over texts: which text a checkpoint was calibrated on."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()


def as_pairs(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs for a model that takes pairs: by turns related and (mostly) not.

    Every other text is cut in two; the rest go with their neighbours.
    """
    pairs = []
    for i, text in enumerate(texts):
        words = text.split(" ")
        half = len(words) // 2
        if i % 2 == 0 and half:
            pairs.append((" ".join(words[:half]), " ".join(words[half:])))
        else:
            pairs.append((text, texts[(i + 1) % len(texts)]))
    return pairs


def make_batches(
    texts: Sequence[str] | Sequence[tuple[str, str]],
    tokenizer: Any,
    max_tokens: int,
    *,
    by_text: bool = False,
    batch_tokens: int = 4096,
) -> list[Batch]:
    """Tokenise texts or pairs into padded batches of inputs of like length.

    Args:
        texts: The texts or pairs.
        tokenizer: A tokenizer of transformers.
        max_tokens: Cut each input to this many tokens.
        by_text: Whether each text counts alike, and not each token.
        batch_tokens: Limit of rows times longest row.

    Returns:
        The batches; every text is in one of them.
    """
    from edgelm.runtimes.engine import batches

    encoded = tokenizer(list(texts), truncation=True, max_length=max_tokens)
    rows, types = encoded["input_ids"], encoded.get("token_type_ids")
    pad = tokenizer.pad_token_id or 0
    made = []
    for group in batches([len(row) for row in rows], batch_tokens):
        ids, mask = _pad([rows[i] for i in group], pad)
        kinds = None if types is None else _pad([types[i] for i in group], 0)[0]
        shares = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) if by_text else None
        made.append(Batch(ids, mask, kinds, shares))
    return made


def _pad(
    rows: Sequence[Sequence[int]], filling: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in one tensor, and where they are in it."""
    import torch

    shape = (len(rows), max(len(row) for row in rows))
    values = torch.full(shape, filling, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for i, row in enumerate(rows):
        values[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return values, mask
