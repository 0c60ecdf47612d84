"""A subject whose answers come from the workers of a Ray cluster, shard by shard and in order."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.bundle import is_bundle, open_bundle
from edgelm.errors import InputError
from edgelm.evaluate.subjects import Progress, Settings, Subject, open_subject, silent
from edgelm.runtimes.index.cluster import RETRIES, fetch

# Inputs of a task. It does not depend on the cluster, and so neither do the answers.
SHARD = 256


def spread(
    ray: Any, reference: str, settings: Settings, progress: Progress = silent
) -> Subject:
    """Open a subject whose work is done on a cluster.

    Shards are of 256 inputs however many workers there are. Where an answer depends on its
    neighbours in a batch (dynamic int8, in the last digits), it is that of its shard.

    Args:
        ray: The module, connected (`edgelm.runtimes.index.cluster.join`).
        reference: A bundle, whose files are sent; or a model that every worker can open by
            this name.
        settings: How workers open it; one thread each if not given.
        progress: As for `open_subject`.

    Raises:
        InputError: It is a language model or a server, whose work is not shared out here.
        EdgelmError: It cannot be opened.
    """
    subject = open_subject(reference, settings)
    answers = {
        name: getattr(subject, name)
        for name in ("encode", "extract", "score")
        if getattr(subject, name) is not None
    }
    if not answers or subject.identity.get("kind") == "endpoint":
        raise InputError(
            f"{reference} is a language model or a server: the work of these is not shared out. Leave --ray away."
        )
    settings = replace(settings, threads=settings.threads or 1)
    sent = ray.put((reference, _files(reference), settings))
    task = ray.remote(num_cpus=settings.threads, max_retries=RETRIES)(answer_shard)

    def over(name: str) -> Callable[..., Any]:
        def ask(inputs: Sequence[Any], *rest: Any) -> Any:
            shards = [inputs[i : i + SHARD] for i in range(0, len(inputs), SHARD)]
            waiting = [task.remote(sent, name, list(one), rest) for one in shards]
            found = []
            for one, result in zip(shards, waiting, strict=True):
                found.append(fetch(ray, result, "Start the command again."))
                done = SHARD * (len(found) - 1) + len(one)
                progress(f"{subject.name} on the cluster", done, len(inputs))
            if not found:
                return answers[name](inputs, *rest)
            if name == "extract":
                return [row for part in found for row in part]
            return np.concatenate(found)

        return ask

    given: dict[str, Any] = {name: over(name) for name in answers}
    return replace(subject, **given)


def answer_shard(
    sent: tuple[str, dict[str, bytes], Settings],
    name: str,
    inputs: list[Any],
    rest: tuple[Any, ...],
) -> Any:
    """What a worker does with a shard; it opens the model once."""
    reference, files, settings = sent
    if reference not in _OPENED:
        _OPENED.clear()
        with tempfile.TemporaryDirectory(prefix="edgelm-bundle-") as folder:
            for file, data in files.items():
                (Path(folder) / file).write_bytes(data)
            _OPENED[reference] = open_subject(folder if files else reference, settings)
    return getattr(_OPENED[reference], name)(inputs, *rest)


# Of a worker's process.
_OPENED: dict[str, Subject] = {}


def _files(reference: str) -> dict[str, bytes]:
    if not is_bundle(reference):
        return {}
    folder = open_bundle(reference).path
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
