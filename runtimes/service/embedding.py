"""Vectors as both dialects want them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import InputError
from edgelm.runtimes.calls import Call
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.quantization import unit
from edgelm.runtimes.service.bodies import Inputs, Prompted, SimilarityParameters
from edgelm.runtimes.service.models import Served
from edgelm.runtimes.service.replies import Refusal
from edgelm.runtimes.service.state import State

Vectors = NDArray[np.float32]


def as_texts(served: Served, inputs: Inputs) -> list[str]:
    """Inputs as texts; token ids, the bundle's own, are decoded.

    Raises:
        Refusal: There is no such token.
    """
    if isinstance(inputs, str):
        return [inputs]
    if all(isinstance(one, int) for one in inputs) and inputs:
        return [decode(served, cast("list[int]", inputs))]
    items = cast("list[str | list[int]]", inputs)
    return [one if isinstance(one, str) else decode(served, one) for one in items]


def decode(served: Served, ids: list[int], *, skip_special: bool = True) -> str:
    """The text of token ids.

    Raises:
        Refusal: There is no such token.
    """
    size = served.tokenizer.get_vocab_size()
    wrong = [i for i in ids if i >= size]
    if wrong:
        raise Refusal(f"There is no token {wrong[0]}: {served.name} has {size} tokens.")
    return served.tokenizer.decode(ids, skip_special_tokens=skip_special)


def check_direction(body: Prompted | SimilarityParameters | Any) -> None:
    """Refuse to cut texts at their beginning."""
    if body.truncation_direction.lower() == "left":
        raise Refusal(
            "truncation_direction Left is not offered: texts are cut at their end. Cut them before you send them.",
            param="truncation_direction",
        )


async def embed(
    state: State,
    served: Served,
    texts: list[str],
    *,
    cut: bool | None = None,
    prompt: str | None = None,
    normalize: bool = True,
    dimensions: int | None = None,
) -> tuple[Vectors, int, Call]:
    """Vectors of texts.

    Args:
        state: The server.
        served: An embedding bundle.
        texts: The texts.
        cut: Whether to cut what is too long.
        prompt: Name of a prompt.
        normalize: Give vectors of length 1.
        dimensions: Keep the first so many, for models that were trained for it.

    Returns:
        float32 ``[n, dimension]``, how many texts were cut, and what it cost.

    Raises:
        Refusal: The bundle cannot give that.
    """
    model, info = served.model, served.manifest.embedding
    assert isinstance(model, Embedder)
    if dimensions is not None and dimensions > model.dimension:
        raise Refusal(
            f"{served.name} has {model.dimension} dimensions; {dimensions} were asked for.",
            param="dimensions",
        )
    if not normalize and info is not None and info.normalize:
        raise Refusal(
            f"The vectors of {served.name} have length 1 inside its graph; normalize=false cannot be had.",
            param="normalize",
        )
    try:
        (vectors, truncated), call = await state.run(
            served,
            model.encode_with_truncation,
            texts,
            inputs=len(texts),
            cut=cut,
            prompt=prompt,
            dimensions=dimensions,
        )
    except InputError as error:
        raise Refusal(str(error)) from error
    if not np.isfinite(vectors).all():
        raise Refusal("embedding is NaN or infinite", 424)
    if normalize and (info is None or not info.normalize):
        vectors = unit(vectors)
    count = int(truncated.sum())
    state.metrics.cut.labels(served.name).inc(count)
    return vectors, count, call
