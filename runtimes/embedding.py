"""Embedding: texts to vectors, and to binary codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import EmbeddingInfo
from edgelm.errors import InputError
from edgelm.runtimes.codes import Coder
from edgelm.runtimes.engine import Engine, check_texts

Output = Literal["vectors", "codes", "query-codes", "queries"]
OUTPUTS: tuple[str, ...] = get_args(Output)


class Embedder:
    """Turns texts into vectors, and where its bundle has a coder into binary codes.

    Attributes:
        engine: The opened bundle.
        dimension: Length of a vector.
        prompts: Name to the text that is put before an input.
        coder: Maps vectors to binary codes; None where the bundle has none.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened embedding bundle; `edgelm.load` does it."""
        info = engine.manifest.embedding or EmbeddingInfo(0, "mean", True)
        self.engine = engine
        self.dimension = info.dimension
        self.prompts = dict(info.prompts)
        self.coder: Coder | None = engine.coder
        self._default_prompt = info.default_prompt

    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Literal["vectors", "queries"] = "vectors",
    ) -> NDArray[np.float32]: ...

    @overload
    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Literal["codes", "query-codes"],
    ) -> NDArray[np.uint8]: ...

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Output = "vectors",
    ) -> NDArray[Any]:
        """Turn texts into vectors or binary codes.

        Args:
            texts: The texts; what is longer than the model takes is cut
                (`encode_with_truncation` tells which).
            prompt: Name of a prompt to put before each text; the bundle's own
                default if not given.
            output: ``vectors``; ``codes`` of documents; of queries ``query-codes``, for a
                search by Hamming distance, or ``queries``, float rows that
                `edgelm.runtimes.codes.asymmetric_scores` scores against codes.

        Returns:
            ``vectors``: float32 ``[len(texts), dimension]``. ``codes`` and ``query-codes``:
            uint8 ``[len(texts), bits // 8]``. ``queries``: float32 ``[len(texts), bits]``.

        Raises:
            InputError: Something among the texts is not a string, there is no such
                prompt or output, or the bundle has no coder.
        """
        return self.encode_with_truncation(texts, prompt=prompt, output=output)[0]

    def encode_with_truncation(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        output: Output = "vectors",
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Turn texts into vectors or codes, and say which texts were cut.

        Args:
            texts: As for `encode`.
            prompt: As for `encode`.
            output: As for `encode`.

        Returns:
            What `encode` gives, and a bool ``[len(texts)]``: True where a text was longer
            than the model takes.
        """
        check_texts(texts)
        convert = self._converter(output)
        prefix = self._prefix(prompt)
        encodings = self.engine.tokenize(
            [prefix + text for text in texts] if prefix else texts
        )
        truncated = np.array([bool(e.overflowing) for e in encodings], dtype=bool)
        if not encodings:
            return convert(np.zeros((0, self.dimension), np.float32)), truncated
        return convert(np.stack(self.engine.run(encodings))), truncated

    def _converter(self, output: str) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
        """What makes an output of vectors."""
        if output not in OUTPUTS:
            raise InputError(
                f"The output must be one of {', '.join(OUTPUTS)}. Got {output!r} instead."
            )
        if output == "vectors":
            return lambda vectors: vectors
        if self.coder is None:
            raise InputError(
                f"{self.engine.name} has no binary codes. Fit them before the export: "
                "edgelm compress MODEL -o CKPT --codes 256."
            )
        if output == "queries":
            return self.coder.project
        return self.coder.encode if output == "codes" else self.coder.encode_queries

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
