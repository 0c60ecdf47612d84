"""Subword models: which tokens need which others so that text comes out as before."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from edgelm.errors import CompressionError


class Pieces(Protocol):
    """A subword model of `tokenizers`, as ``tokenizer.json`` writes it."""

    def __init__(self, model: Mapping[str, Any]) -> None: ...

    def closure(self, tokens: set[str]) -> set[str]:
        """Tokens, what they are made by, and what spells everything else."""
        ...

    def within(self, words: Iterable[str]) -> set[str]:
        """All tokens that are a part of words."""
        ...

    def trimmed(self, kept: set[str], new: Mapping[int, int]) -> dict[str, Any]:
        """The model of fewer tokens, with other numbers."""
        ...


class WordPiece:
    """Longest match first (Schuster and Nakajima 2012; as in BERT).

    With fewer tokens the longest match is the same wherever it is kept.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Take the model's part of ``tokenizer.json``."""
        self._model = model
        self._vocab: dict[str, int] = model["vocab"]
        self._prefix = str(model.get("continuing_subword_prefix") or "")

    def closure(self, tokens: set[str]) -> set[str]:
        """Add single characters, and every token with one that cannot stand alone."""
        vocab, prefix = self._vocab, self._prefix
        alone = {c for c in vocab if len(c) == 1 and prefix + c in vocab}
        kept = tokens | {str(self._model["unk_token"])}
        for token in vocab:
            inner = token.removeprefix(prefix)
            if len(inner) == 1 or not alone.issuperset(inner):
                kept.add(token)
        return kept

    def within(self, words: Iterable[str]) -> set[str]:
        """Parts of words, at their beginning and behind it."""
        longest = max(map(len, self._vocab))
        parts = {part for word in words for part in _parts(word, longest)}
        parts |= {self._prefix + part for part in parts}
        return parts & set(self._vocab)

    def trimmed(self, kept: set[str], new: Mapping[int, int]) -> dict[str, Any]:
        """Fewer entries."""
        return {**self._model, "vocab": _renumbered(self._vocab, kept, new)}


class Bpe:
    """Merges by rank (Sennrich et al. 2016, arXiv 1508.07909), of characters or bytes.

    With the merges that made a token, and fewer others, it is made in the same order.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Take the model's part of ``tokenizer.json``."""
        self._model = model
        self._vocab: dict[str, int] = model["vocab"]
        self._prefix = str(model.get("continuing_subword_prefix") or "")
        self._suffix = str(model.get("end_of_word_suffix") or "")
        self._ranks: dict[tuple[str, str], int] = {}
        self._makers: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self._ranks[left, right] = rank
            self._makers[self._join(left, right)].append((left, right))

    def closure(self, tokens: set[str]) -> set[str]:
        """Add single characters and bytes, and what tokens are merged from."""
        kept = {t for t in self._vocab if len(self._inner(t)) == 1 or _is_byte(t)}
        if self._model.get("unk_token"):
            kept.add(str(self._model["unk_token"]))
        todo = list(tokens)
        while todo:
            token = todo.pop()
            if token in kept:
                continue
            kept.add(token)
            made = self._path(token)
            if made is None:
                made = {part for pair in self._makers[token] for part in pair}
            todo += made - kept
        return kept & set(self._vocab)

    def within(self, words: Iterable[str]) -> set[str]:
        """Parts of words, at their beginning, behind it and at their end."""
        longest = max(map(len, self._vocab))
        parts = {part for word in words for part in _parts(word, longest)}
        parts |= {self._prefix + part for part in parts}
        parts |= {part + self._suffix for part in parts}
        return parts & set(self._vocab)

    def trimmed(self, kept: set[str], new: Mapping[int, int]) -> dict[str, Any]:
        """Fewer entries, and the merges among them."""
        merges = [
            merge if isinstance(self._model["merges"][0], list) else " ".join(merge)
            for merge in map(list, self._ranks)
            if {*merge, self._join(*merge)} <= kept
        ]
        vocab = _renumbered(self._vocab, kept, new)
        return {**self._model, "vocab": vocab, "merges": merges}

    def _join(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix)

    def _inner(self, token: str) -> str:
        return token.removeprefix(self._prefix).removesuffix(self._suffix)

    def _path(self, token: str) -> set[str] | None:
        """What lies on the way from characters to a token; None where merges lead elsewhere."""
        inner = self._inner(token)
        if not inner:
            return set()
        symbols = [self._prefix + c for c in inner]
        if not token.startswith(self._prefix):
            symbols[0] = inner[0]
        if token.endswith(self._suffix):
            symbols[-1] += self._suffix
        seen: set[str] = set()
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            known = [pair for pair in pairs if pair in self._ranks]
            if not known:
                return None
            at = pairs.index(min(known, key=self._ranks.__getitem__))
            symbols[at : at + 2] = [self._join(*pairs[at])]
            seen.add(symbols[at])
        return seen if symbols == [token] else None


class Unigram:
    """The likeliest sequence of tokens (Kudo 2018, arXiv 1804.10959).

    It stays the likeliest among fewer sequences.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        """Take the model's part of ``tokenizer.json``."""
        self._model = model
        self._scores: dict[str, float] = dict(model["vocab"])
        if len(self._scores) < len(model["vocab"]):
            raise CompressionError(
                "The tokenizer lists a token twice, so tokens have no one number. Leave its vocabulary whole."
            )

    def closure(self, tokens: set[str]) -> set[str]:
        """Add single characters, bytes, and tokens with a character that cannot stand alone."""
        kept = tokens | {t for t in self._scores if len(t) == 1 or _is_byte(t)}
        if self._model.get("unk_id") is not None:
            kept.add(self._model["vocab"][self._model["unk_id"]][0])
        if not self._model.get("byte_fallback"):
            alone = {t for t in self._scores if len(t) == 1}
            kept |= {t for t in self._scores if not alone.issuperset(t)}
        # The library's price of an unknown character follows from the least score.
        kept.add(min(self._scores, key=self._scores.__getitem__))
        return kept

    def within(self, words: Iterable[str]) -> set[str]:
        """Parts of words."""
        longest = max(map(len, self._scores))
        parts = {part for word in words for part in _parts(word, longest)}
        return parts & set(self._scores)

    def trimmed(self, kept: set[str], new: Mapping[int, int]) -> dict[str, Any]:
        """Fewer entries; their place in the list is their number."""
        vocab = [[t, s] for t, s in self._scores.items() if t in kept]
        unknown = self._model.get("unk_id")
        return {
            **self._model,
            "vocab": vocab,
            "unk_id": None if unknown is None else new[unknown],
        }


MODELS: dict[str, type[Pieces]] = {
    "WordPiece": WordPiece,
    "BPE": Bpe,
    "Unigram": Unigram,
}


def _renumbered(
    vocab: Mapping[str, int], kept: set[str], new: Mapping[int, int]
) -> dict[str, int]:
    return {token: new[i] for token, i in vocab.items() if token in kept}


def _is_byte(token: str) -> bool:
    """Whether a token stands for a byte, as in ``<0x0A>``."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _parts(word: str, longest: int) -> Iterator[str]:
    for begin in range(len(word)):
        for end in range(begin + 1, min(len(word), begin + longest) + 1):
            yield word[begin:end]
