"""Embedding: texts to vectors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import EmbeddingInfo
from edgelm.errors import InputError
from edgelm.runtimes.engine import Engine, check_texts


class Embedder:
    """Turns texts into vectors.

    Attributes:
        engine: The opened bundle.
        dimension: Length of a vector.
        prompts: Name to the text that is put before an input.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an opened embedding bundle; `edgelm.load` does it."""
        info = engine.manifest.embedding or EmbeddingInfo(0, "mean", True)
        self.engine = engine
        self.dimension = info.dimension
        self.prompts = dict(info.prompts)
        self._default_prompt = info.default_prompt

    def encode(
        self, texts: Sequence[str], *, prompt: str | None = None
    ) -> NDArray[np.float32]:
        """Turn texts into vectors.

        Args:
            texts: The texts; what is longer than the model takes is cut
                (`encode_with_truncation` tells which).
            prompt: Name of a prompt to put before each text; the bundle's own
                default if not given.

        Returns:
            float32 ``[len(texts), dimension]``.

        Raises:
            InputError: Something among the texts is not a string, or there is no
                such prompt.
        """
        return self.encode_with_truncation(texts, prompt=prompt)[0]

    def encode_with_truncation(
        self, texts: Sequence[str], *, prompt: str | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Turn texts into vectors, and say which texts were cut.

        Args:
            texts: As for `encode`.
            prompt: As for `encode`.

        Returns:
            The vectors, and a bool ``[len(texts)]``: True where a text was longer
            than the model takes.
        """
        check_texts(texts)
        prefix = self._prefix(prompt)
        encodings = self.engine.tokenize(
            [prefix + text for text in texts] if prefix else texts
        )
        truncated = np.array([bool(e.overflowing) for e in encodings], dtype=bool)
        if not encodings:
            return np.zeros((0, self.dimension), np.float32), truncated
        return np.stack(self.engine.run(encodings)), truncated

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
