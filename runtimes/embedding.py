"""Embedding: texts to vectors, and to binary codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgelm.bundle import POOLED, TOKENS
from edgelm.errors import InputError
from edgelm.manifest import EmbeddingInfo
from edgelm.runtimes.codes import Coder
from edgelm.runtimes.engine import Engine, check_texts
from edgelm.runtimes.quantization import Ranges, given_ranges, shorten, signs, unit

if TYPE_CHECKING:
    from tokenizers import Encoding

Output = Literal[
    "vectors", "int8", "uint8", "binary", "codes", "query-codes", "queries"
]
OUTPUTS: tuple[str, ...] = get_args(Output)
LongTexts = Literal["truncate", "error", "windows"]
AnyRanges = Ranges | tuple[ArrayLike, ArrayLike]


# Texts of a part: no more than two of them are tokens at a time.
_PART = 1024


@dataclass(frozen=True)
class TokenVectors:
    """The vectors of a text's tokens, special tokens included.

    Attributes:
        vectors: float32 ``[tokens, dimension]``, not normalised.
        offsets: int64 ``[tokens, 2]``: where each stands in the text (behind its prompt), in
            code points, half-open; ``(0, 0)`` for special tokens and for a prompt's.
        truncated: Whether the text was longer than the model takes.
    """

    vectors: NDArray[np.float32]
    offsets: NDArray[np.int64]
    truncated: bool


class Embedder:
    """Turns texts into vectors, and where its bundle has a coder into binary codes.

    Attributes:
        engine: The opened bundle.
        dimension: Length of a vector.
        dimensions: Shorter lengths that the model was trained for; empty where its files
            do not say.
        prompts: Name to the text that is put before an input.
        coder: Maps vectors to binary codes; None where the bundle has none.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened embedding bundle; `edgelm.load` does it."""
        info = engine.manifest.embedding or EmbeddingInfo(0, "mean", True)
        self.engine = engine
        self.dimension = info.dimension
        self.dimensions = info.dimensions
        self.prompts = dict(info.prompts)
        self.coder: Coder | None = engine.coder
        self._normalize = info.normalize
        self._default_prompt = info.default_prompt

    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Literal["vectors", "queries"] = "vectors",
        dimensions: int | None = None,
        ranges: AnyRanges | None = None,
        long_texts: LongTexts = "truncate",
    ) -> NDArray[np.float32]: ...

    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Literal["uint8", "binary", "codes", "query-codes"],
        dimensions: int | None = None,
        ranges: AnyRanges | None = None,
        long_texts: LongTexts = "truncate",
    ) -> NDArray[np.uint8]: ...

    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Literal["int8"],
        dimensions: int | None = None,
        ranges: AnyRanges | None = None,
        long_texts: LongTexts = "truncate",
    ) -> NDArray[np.int8]: ...

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Output = "vectors",
        dimensions: int | None = None,
        ranges: AnyRanges | None = None,
        long_texts: LongTexts = "truncate",
    ) -> NDArray[Any]:
        """Turn texts into vectors or binary codes.

        Args:
            texts: The texts.
            prompt: Name of a prompt to put before each text; the bundle's own
                default if not given.
            output: ``vectors``; ``int8`` or ``uint8``, the vectors with a byte a number
                (`edgelm.runtimes.quantization.Ranges`); ``binary``, their signs; or of the
                bundle's coder ``codes`` of documents, of queries ``query-codes``, for a
                search by Hamming distance, or ``queries``, float rows that
                `edgelm.runtimes.codes.asymmetric_scores` scores against codes.
            dimensions: Give the first so many dimensions only, of length 1 again where
                the bundle's vectors are: for models that were trained so (Matryoshka).
            ranges: For ``int8`` and ``uint8``, least and greatest value of each
                dimension; those measured at export if not given (`calibrate` measures).
            long_texts: What becomes of texts that are longer than the model takes.
                ``truncate``: they are cut (`encode_with_truncation` tells which).
                ``error``: they are refused. ``windows``: they are read in windows that
                do not overlap, whose vectors' mean, weighted by their tokens, is the text's
                (of length 1 again where the bundle's vectors are); a prompt stands
                before the first window only.

        Returns:
            ``vectors``: float32 ``[len(texts), dimension]``. ``int8`` and ``uint8``: of the
            same shape. ``binary``: uint8 ``[len(texts), ceil(dimension / 8)]``. ``codes``
            and ``query-codes``: uint8 ``[len(texts), bits // 8]``. ``queries``: float32
            ``[len(texts), bits]``.

        Raises:
            InputError: Something among the texts is not a string, there is no such
                prompt, output or number of dimensions, the bundle has no coder or no
                ranges, or a text is too long and ``long_texts`` is ``error``.
        """
        return self.encode_with_truncation(
            texts,
            prompt=prompt,
            output=output,
            dimensions=dimensions,
            ranges=ranges,
            long_texts=long_texts,
        )[0]

    def encode_with_truncation(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Output = "vectors",
        dimensions: int | None = None,
        ranges: AnyRanges | None = None,
        long_texts: LongTexts = "truncate",
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Turn texts into vectors or codes, and say which texts were cut.

        Args:
            texts: As for `encode`.
            prompt: As for `encode`.
            output: As for `encode`.
            dimensions: As for `encode`.
            ranges: As for `encode`.
            long_texts: As for `encode`.

        Returns:
            What `encode` gives, and a bool ``[len(texts)]``: True where a text was longer
            than the model takes and was cut.
        """
        if long_texts not in get_args(LongTexts):
            raise InputError(
                f"long_texts must be one of {', '.join(get_args(LongTexts))}. Got {long_texts!r} instead."
            )
        convert = self._converter(output, dimensions, ranges)
        many = isinstance(texts, Sequence) and len(texts) > _PART
        if many and long_texts == "truncate":
            return self._encode_parts(texts, prompt, convert)
        encodings = self._tokenize(texts, prompt)[1]
        truncated = np.array([bool(e.overflowing) for e in encodings], dtype=bool)
        if long_texts == "error" and truncated.any():
            raise InputError(
                f"Text {int(truncated.argmax())} is longer than the {self.engine.manifest.tokenizer.max_length} tokens "
                'that the model takes. Shorten it, or choose long_texts="windows" or "truncate".'
            )
        if not encodings:
            return convert(np.zeros((0, self.dimension), np.float32)), truncated
        if long_texts == "truncate" or not truncated.any():
            return convert(np.stack(self.engine.run(encodings, POOLED))), truncated
        return convert(self._pool_windows(encodings)), np.zeros_like(truncated)

    def encode_tokens(
        self, texts: Sequence[str], *, prompt: str | None = None
    ) -> list[TokenVectors]:
        """Turn texts into a vector for each token: what the pooling would pool.

        Args:
            texts: The texts; what is longer than the model takes is cut.
            prompt: As for `encode`.

        Raises:
            InputError: As for `encode`.
            BundleError: The bundle's graph does not give the vectors of tokens.
        """
        self.engine.check_outputs((TOKENS,))
        prefix, encodings = self._tokenize(texts, prompt)
        vectors = self.engine.run(encodings, TOKENS)
        found = []
        for rows, encoding in zip(vectors, encodings, strict=True):
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            offsets = np.maximum(offsets - len(prefix), 0)
            found.append(TokenVectors(rows, offsets, bool(encoding.overflowing)))
        return found

    def calibrate(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        dimensions: int | None = None,
    ) -> Ranges:
        """Measure the ranges that ``int8`` and ``uint8`` spread their values over.

        Args:
            texts: Texts such as will be encoded; some hundred do.
            prompt: As for `encode`.
            dimensions: As for `encode`.

        Returns:
            Least and greatest value of each dimension.

        Raises:
            InputError: As for `encode`; or there is no text.
        """
        return Ranges.of(self.encode(texts, prompt=prompt, dimensions=dimensions))

    def _encode_parts(
        self,
        texts: Sequence[str],
        prompt: str | None,
        convert: Callable[[NDArray[np.float32]], NDArray[Any]],
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Many texts: a part is tokenised while the one before it is in the graph."""
        check_texts(texts)  # all, so that an error names the text by its place
        rows: list[NDArray[Any]] = []
        truncated: list[bool] = []
        with ThreadPoolExecutor(1) as tokenizing:
            coming = tokenizing.submit(self._tokenize, texts[:_PART], prompt)
            for after in range(_PART, len(texts) + _PART, _PART):
                encodings = coming.result()[1]
                if after < len(texts):
                    part = texts[after : after + _PART]
                    coming = tokenizing.submit(self._tokenize, part, prompt)
                rows.append(convert(np.stack(self.engine.run(encodings, POOLED))))
                truncated += [bool(e.overflowing) for e in encodings]
        return np.concatenate(rows), np.array(truncated, dtype=bool)

    def _tokenize(
        self, texts: Sequence[str], prompt: str | None
    ) -> tuple[str, list[Encoding]]:
        check_texts(texts)
        prefix = self._prefix(prompt)
        return prefix, self.engine.tokenize(
            [prefix + text for text in texts] if prefix else texts
        )

    def _pool_windows(self, encodings: Sequence[Encoding]) -> NDArray[np.float32]:
        groups = [[first, *first.overflowing] for first in encodings]
        windows = [window for group in groups for window in group]
        rows = iter(self.engine.run(windows, POOLED))
        means = np.stack(
            [
                np.average(
                    [next(rows) for _ in group],
                    axis=0,
                    weights=[len(window) for window in group],
                )
                for group in groups
            ]
        ).astype(np.float32)
        return unit(means) if self._normalize else means

    def _converter(
        self, output: str, dimensions: int | None, ranges: AnyRanges | None
    ) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
        """What makes an output of vectors."""
        if output not in OUTPUTS:
            raise InputError(
                f"The output must be one of {', '.join(OUTPUTS)}. Got {output!r} instead."
            )
        if output in ("codes", "query-codes", "queries"):
            if dimensions is not None:
                raise InputError(
                    "The codes of a coder are of whole vectors; leave dimensions out."
                )
            return self._coder(output)
        cut = self._shortener(dimensions)
        if output == "vectors":
            return cut
        if output == "binary":
            return lambda vectors: signs(cut(vectors))
        spread = self._ranges(dimensions, ranges)
        if output == "uint8":
            return lambda vectors: spread.quantize(cut(vectors))
        return lambda vectors: (
            spread.quantize(cut(vectors)).astype(np.int16) - 128
        ).astype(np.int8)

    def _coder(self, output: str) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
        if self.coder is None:
            raise InputError(
                f"{self.engine.name} has no binary codes. Fit them before the export: "
                "edgelm compress MODEL -o CKPT --codes 256."
            )
        if output == "queries":
            return self.coder.project
        return self.coder.encode if output == "codes" else self.coder.encode_queries

    def _shortener(
        self, dimensions: int | None
    ) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        if dimensions is None or dimensions == self.dimension:
            return lambda vectors: vectors
        if self.dimensions and dimensions not in self.dimensions:
            known = ", ".join(map(str, self.dimensions))
            raise InputError(
                f"This model was trained for {known} dimensions. Got {dimensions} instead."
            )
        if (
            not isinstance(dimensions, Integral)
            or not 1 <= dimensions <= self.dimension
        ):
            raise InputError(
                f"dimensions must be 1 to {self.dimension}. Got {dimensions!r} instead."
            )
        normalize = self._normalize
        return lambda vectors: shorten(vectors, dimensions, normalize=normalize)

    def _ranges(self, dimensions: int | None, ranges: AnyRanges | None) -> Ranges:
        if ranges is not None:
            return given_ranges(ranges)
        if self.engine.ranges is None:
            raise InputError(
                f"{self.engine.name} has no ranges for bytes. Measure them: ranges=embedder.calibrate(texts)."
            )
        if dimensions not in (None, self.dimension):
            raise InputError(
                f"The bundle's ranges are of {self.dimension} dimensions. "
                f"Measure others: ranges=embedder.calibrate(texts, dimensions={dimensions})."
            )
        return self.engine.ranges

    def _prefix(self, prompt: str | None) -> str:
        name = self._default_prompt if prompt is None else prompt
        if name is None:
            return ""
        if name not in self.prompts:
            known = ", ".join(sorted(self.prompts)) or "none"
            raise InputError(
                f"This bundle has no prompt '{name}'. Its prompts: {known}."
            )
        return self.prompts[name]
