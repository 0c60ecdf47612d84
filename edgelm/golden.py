"""Golden examples: inputs and what the original model gave, carried by every bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from edgelm.bundle import Bundle
from edgelm.errors import BundleError

GOLDEN_TEXTS, GOLDEN_ARRAYS = "golden.jsonl", "golden.safetensors"


@dataclass(frozen=True)
class GoldenExample:
    """A text and what the original model gave for it.

    Attributes:
        text: The text.
        pair: The second text, where the task scores pairs.
        input_ids: int64 ``[sequence]``, without padding.
        output: float32; the shape of the graph's output without the batch.
    """

    text: str
    pair: str | None
    input_ids: NDArray[np.int64]
    output: NDArray[np.float32]


def save_golden(folder: Path, examples: list[GoldenExample]) -> None:
    """Write golden examples into a bundle's folder."""
    with (folder / GOLDEN_TEXTS).open("w", encoding="utf-8", newline="\n") as lines:
        for example in examples:
            line = {"text": example.text}
            if example.pair is not None:
                line["pair"] = example.pair
            lines.write(json.dumps(line, ensure_ascii=False) + "\n")
    arrays: dict[str, NDArray[Any]] = {}
    for i, example in enumerate(examples):
        arrays[f"{i}.input_ids"] = example.input_ids
        arrays[f"{i}.output"] = example.output
    save_file(arrays, folder / GOLDEN_ARRAYS)


def load_golden(bundle: Bundle) -> list[GoldenExample]:
    """Read the golden examples of a bundle.

    Raises:
        BundleError: The two golden files do not fit each other.
    """
    golden = bundle.manifest.golden
    text = bundle.file(golden.texts).read_text(encoding="utf-8")
    try:
        arrays = load_file(bundle.file(golden.arrays))
        lines = [json.loads(line) for line in text.split("\n") if line]
        return [
            GoldenExample(
                line["text"],
                line.get("pair"),
                arrays[f"{i}.input_ids"],
                arrays[f"{i}.output"],
            )
            for i, line in enumerate(lines)
        ]
    except (KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise BundleError(
            f"The golden examples of {bundle.path} cannot be read: {error}."
        ) from error
