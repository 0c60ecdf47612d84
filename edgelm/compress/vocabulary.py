"""A smaller vocabulary: the tokens that some text uses, and what spells everything else.

Lossless on the text: where all tokens of an input are kept, the smaller tokenizer cuts it into the same
pieces, whose embeddings are the same rows. Other text falls back to smaller pieces, at worst to single
characters or bytes.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from edgelm.compress.pieces import MODELS, Pieces
from edgelm.errors import CompressionError, ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgelm.models import LoadedModel

AUTO = "auto"
_CHUNK = 1000
_NAME = "tokenizer.json"

Texts = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens stay.

    Attributes:
        texts: ``auto`` (the texts that compression is calibrated on), or a file of
            texts as `edgelm.calibration.read_texts` reads it.
        size: Keep at most so many tokens of the text, the most frequent; None: all.
            What spells other text stays besides.
    """

    version: ClassVar[int] = 1

    texts: str = AUTO
    size: int | None = None

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        if self.size is not None and self.size < 1:
            raise ConfigError(
                f"The 'size' parameter of Vocabulary must be at least 1. Got {self.size} instead."
            )


def trim_vocabulary(
    loaded: LoadedModel, config: Vocabulary, texts: Texts, digest: str
) -> LoadedModel:
    """Give a model a smaller vocabulary.

    Args:
        loaded: The model, whole in memory; its tables are trimmed in place.
        config: Which tokens stay.
        texts: Gives the texts; they are read more than once.
        digest: SHA-256 (hex) of the texts, for the record.

    Returns:
        The model with its new tokenizer; ``steps`` records what was done.

    Raises:
        CompressionError: The tokenizer has no smaller pieces to fall back to, or some
            part of the model depends on the vocabulary in a way that is not known.
    """
    backend = _plain(loaded.tokenizer.backend_tokenizer.to_str())
    spec = json.loads(backend.to_str())
    kind = spec["model"]["type"]
    if kind not in MODELS:
        raise CompressionError(
            f"The tokenizer of {loaded.name} is a {kind}, which has no smaller pieces to fall back to. "
            "Leave its vocabulary whole."
        )
    pieces = MODELS[kind](spec["model"])
    table: Any = loaded.model.get_input_embeddings()
    rows = int(table.weight.shape[0])
    names = {i: token for token, i in backend.get_vocab(True).items()}
    if max(names) >= rows:
        raise CompressionError(
            f"The tokenizer of {loaded.name} has the token {max(names)}, and its embedding table {rows} rows."
        )
    counts: Counter[int] = Counter()
    for chunk in _chunks(texts()):
        for encoding in backend.encode_batch(chunk, add_special_tokens=False):
            counts.update(encoding.ids)
    used = {token for token, _ in counts.most_common(config.size)}
    needed = used | _special(loaded, spec, names, rows)
    kept = pieces.closure({names[i] for i in needed if i in names})
    kept |= {t["content"] for t in spec["added_tokens"]}
    while True:
        ids = sorted(i for i, token in names.items() if token in kept)
        small = _plain(json.dumps(trimmed(spec, pieces, kept, ids)))
        lacking = _differing(backend, small, texts, ids, kept, pieces)
        if not lacking:
            break
        kept = pieces.closure(kept | lacking)
    trim_model_(loaded.model, ids)
    step = {
        "method": "vocabulary",
        "version": config.version,
        "texts": config.texts,
        "texts_digest": digest,
        **({} if config.size is None else {"size": config.size}),
        "kept": len(ids),
        "of": len(names),
    }
    tokenizer = _reload(loaded.tokenizer, small, ids)
    return replace(loaded, tokenizer=tokenizer, steps=(*loaded.steps, step))


def trimmed(
    spec: Mapping[str, Any], pieces: Pieces, kept: set[str], ids: Sequence[int]
) -> dict[str, Any]:
    """The ``tokenizer.json`` of fewer tokens.

    Args:
        spec: The whole one, parsed.
        pieces: Its model.
        kept: Tokens that stay, added ones included.
        ids: Their numbers, ascending: the place in this list is the new number.
    """
    new = {old: i for i, old in enumerate(ids)}
    made = copy.deepcopy(dict(spec))
    made["model"] = pieces.trimmed(kept, new)
    for token in made["added_tokens"]:
        token["id"] = new[token["id"]]
    for part in _processors(made.get("post_processor")):
        for token in part.get("special_tokens", {}).values():
            token["ids"] = [new[i] for i in token["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], new[part[name][1]]]
    if made.get("padding"):
        made["padding"]["pad_id"] = new[made["padding"]["pad_id"]]
    return made


def trim_model_(model: Any, ids: Sequence[int]) -> None:
    """Keep some rows of a model's token tables, in place; numbers in its config follow.

    Args:
        model: A model of transformers.
        ids: Rows to keep, ascending.

    Raises:
        CompressionError: Something else in the model has a row for each token.
    """
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    rows = inputs.weight.shape[0]
    tied = outputs is not None and outputs.weight is inputs.weight
    known = {id(inputs.weight)}
    if outputs is not None:
        known |= {id(p) for p in outputs.parameters()}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.ndim and tensor.shape[0] == rows and id(tensor) not in known:
            raise CompressionError(
                f"{name} has a row for each token, and edgelm does not know what it is for. "
                "Leave the vocabulary of this model whole."
            )
    index = torch.tensor(ids)
    inputs.weight = _rows(inputs.weight, index)
    inputs.num_embeddings = len(ids)
    if outputs is not None:
        outputs.weight = inputs.weight if tied else _rows(outputs.weight, index)
        if getattr(outputs, "bias", None) is not None:
            outputs.bias = _rows(outputs.bias, index)
        outputs.out_features = len(ids)
    new = {old: i for i, old in enumerate(ids)}
    if inputs.padding_idx is not None:
        inputs.padding_idx = new[inputs.padding_idx]
    for config in _configs(model):
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(ids)
        for name, value in vars(config).items():
            if not name.endswith("_token_id"):
                continue
            if isinstance(value, list):
                setattr(config, name, [new.get(i, i) for i in value])
            elif isinstance(value, int):
                setattr(config, name, new.get(value, value))


def _rows(parameter: nn.Parameter, index: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(
        parameter.detach()[index].clone(), requires_grad=parameter.requires_grad
    )


def _configs(model: Any) -> list[Any]:
    """The configs that name tokens, each once."""
    found = [model.config, model.config.get_text_config()]
    found.append(getattr(model, "generation_config", None))
    return list({id(config): config for config in found if config is not None}.values())


def _special(
    loaded: LoadedModel, spec: Mapping[str, Any], names: Mapping[int, str], rows: int
) -> set[int]:
    """Numbers of tokens that stay whatever the text: something refers to them."""
    found = {token["id"] for token in spec["added_tokens"]}
    found |= set(loaded.tokenizer.all_special_ids)
    for part in _processors(spec.get("post_processor")):
        found |= {i for t in part.get("special_tokens", {}).values() for i in t["ids"]}
        found |= {part[name][1] for name in ("sep", "cls") if name in part}
    for config in _configs(loaded.model):
        for name, value in vars(config).items():
            if name.endswith("_token_id"):
                found |= set(value if isinstance(value, list) else [value])
    pad = loaded.tokenizer.pad_token_id
    places = [m for m in loaded.model.modules() if isinstance(m, nn.Embedding)]
    if pad is not None and any(
        m.padding_idx == pad and m.weight.shape[0] != rows for m in places
    ):
        # RoBERTa counts positions from the number of the padding token: it must not move.
        found |= set(range(pad + 1))
    return {i for i in found if isinstance(i, int) and 0 <= i < rows and i in names}


def _processors(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A post-processor and those inside it."""
    if part:
        yield part
        for inner in part.get("processors", ()):
            yield from _processors(inner)


def _plain(text: str) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    source = iter(texts)
    while chunk := list(islice(source, _CHUNK)):
        yield chunk


def _differing(
    full: Tokenizer,
    small: Tokenizer,
    texts: Texts,
    ids: Sequence[int],
    kept: set[str],
    pieces: Pieces,
) -> set[str]:
    """Tokens that would mend inputs whose tokens are kept and that still come out otherwise.

    With every token that is a part of an input, a tokenizer has the same choices there as the
    whole one, so this ends.
    """
    new = {old: i for i, old in enumerate(ids)}
    lacking: set[str] = set()
    for chunk in _chunks(texts()):
        pairs = zip(
            chunk,
            full.encode_batch(chunk, add_special_tokens=False),
            small.encode_batch(chunk, add_special_tokens=False),
            strict=True,
        )
        for text, before, after in pairs:
            wanted = [new.get(i) for i in before.ids]
            if None in wanted or wanted == after.ids:
                continue
            mending = pieces.within(_words(full, text)) - kept
            if not mending:
                raise CompressionError(
                    f"With fewer tokens the tokenizer cuts this text otherwise: {text[:80]!r}. "
                    "Leave its vocabulary whole."
                )
            lacking |= mending
    return lacking


def _words(tokenizer: Tokenizer, text: str) -> list[str]:
    """What the tokenizer's model is given."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [text]
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _reload(tokenizer: Any, small: Tokenizer, ids: Sequence[int]) -> Any:
    """The tokenizer of transformers around other pieces, by way of its files."""
    from transformers import AutoTokenizer

    new = {old: i for i, old in enumerate(ids)}
    with tempfile.TemporaryDirectory() as work:
        tokenizer.save_pretrained(work)
        for path in Path(work).iterdir():
            if path.name not in (_NAME, "tokenizer_config.json", "chat_template.jinja"):
                path.unlink()  # other forms of the whole vocabulary
        (Path(work) / _NAME).write_text(small.to_str(), encoding="utf-8")
        path = Path(work) / "tokenizer_config.json"
        settings = json.loads(path.read_text(encoding="utf-8"))
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"] = {
                str(new[int(i)]): token
                for i, token in settings["added_tokens_decoder"].items()
            }
            path.write_text(json.dumps(settings), encoding="utf-8")
        made = AutoTokenizer.from_pretrained(work, trust_remote_code=False)
    read = _plain(made.backend_tokenizer.to_str())
    if json.loads(read.to_str()) != json.loads(small.to_str()):
        raise CompressionError(
            f"transformers does not read the smaller tokenizer back as it was written ({type(made).__name__}). "
            "Leave its vocabulary whole."
        )
    return made
