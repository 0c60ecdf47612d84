"""What binary codes shall be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgelm.errors import ConfigError
from edgelm.runtimes.codes import MAX_BITS, MIN_BITS, is_width


@dataclass(frozen=True)
class BinaryCodes:
    """Binary codes of embeddings.

    Attributes:
        bits: Length of a code; a multiple of 8.
        kind: How codes are made; docs/codes.md has the formulas and what each is worth.
        iterations: Rounds of the rotation's optimisation (``itq`` and what builds on it).
        rounds: Rounds in which codes and decoder are fitted to each other (``autoencoder``
            and ``projection``).
        sweeps: With ``autoencoder``, how often each bit of a document's code is looked at again.
        ridge: Added to the mean squares of the bits where the decoder is solved for.
        seed: Of the random rotation to begin with.
    """

    version: ClassVar[int] = 1

    bits: int = 256
    kind: Literal["sign", "centred", "rotation", "itq", "projection", "autoencoder"] = (
        "autoencoder"
    )
    iterations: int = 50
    rounds: int = 4
    sweeps: int = 4
    ridge: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, fits, due in (
            (
                "bits",
                is_width(self.bits),
                f"a multiple of 8 from {MIN_BITS} to {MAX_BITS}",
            ),
            ("iterations", self.iterations >= 0, "at least 0"),
            ("rounds", self.rounds >= 1, "at least 1"),
            ("sweeps", 0 <= self.sweeps <= 100, "in [0, 100]"),
            ("ridge", self.ridge > 0, "above 0"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError(
                    f"The '{name}' parameter of BinaryCodes must be {due}. Got {getattr(self, name)} instead."
                )
