"""Whether a bundle still computes what the original model computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgelm.bundle import POOLED
from edgelm.errors import GateError
from edgelm.golden import GoldenExample
from edgelm.metrics import snr_db
from edgelm.runtimes.engine import Engine


@dataclass(frozen=True)
class Verification:
    """What replaying the golden examples showed.

    Attributes:
        examples: How many were replayed.
        snr_db: Signal-to-noise ratio over all of them, dB.
        min_snr_db: What the manifest demands, dB.
        provider: What ran the graph.
    """

    examples: int
    snr_db: float
    min_snr_db: float
    provider: str


def verify(engine: Engine, examples: Sequence[GoldenExample]) -> Verification:
    """Replay the golden examples of a bundle.

    Args:
        engine: The opened bundle.
        examples: Its golden examples.

    Returns:
        The measured agreement, which is within the manifest's tolerance.

    Raises:
        GateError: The tokenizer or the graph gives something else than the
            original model did.
    """
    demanded = engine.manifest.golden.min_snr_db
    measured = measure_snr(engine, examples)
    if measured < demanded:
        raise GateError(
            f"{engine.name} on {engine.session.provider} does not give what the original model gave: "
            f"{measured:.1f} dB signal to noise over {len(examples)} golden examples; "
            f"its manifest demands {demanded:.1f} dB."
        )
    return Verification(len(examples), measured, demanded, engine.session.provider)


def measure_snr(engine: Engine, examples: Sequence[GoldenExample]) -> float:
    """Signal-to-noise ratio of a graph over golden examples, dB.

    The examples run together, so in padded batches of several sizes.

    Raises:
        GateError: The tokenizer gives other tokens, or an output is not finite.
    """
    with_pair = [example for example in examples if example.pair is not None]
    encodings = engine.tokenize(
        [example.text for example in examples],
        [str(example.pair) for example in examples] if with_pair else None,
    )
    for i, (encoding, example) in enumerate(zip(encodings, examples, strict=True)):
        if encoding.ids != example.input_ids.tolist():
            raise GateError(
                f"The tokenizer of {engine.name} gives other tokens than the original for golden example {i}."
            )
    outputs = engine.run(encodings)
    if not all(np.isfinite(output).all() for output in outputs):
        raise GateError(
            f"The graph of {engine.name} gives numbers that are not finite."
        )
    # Where heads stand behind the graph, its golden outputs are vectors.
    classes = engine.manifest.graph.outputs[0].name != POOLED
    reference = np.concatenate([_centred(e.output, classes) for e in examples])
    return snr_db(reference, np.concatenate([_centred(o, classes) for o in outputs]))


def _centred(output: NDArray[np.float32], classes: bool) -> NDArray[np.float64]:
    """Flat; logits of several labels without their mean, which no softmax sees."""
    values = output.astype(np.float64)
    if classes and values.shape[-1] > 1:
        values = values - values.mean(axis=-1, keepdims=True)
    return values.ravel()
