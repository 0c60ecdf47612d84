"""Models behind HTTP, as `edgelm serve`, text-embeddings-inference and OpenAI's API answer."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from edgelm.errors import SessionError
from edgelm.runtimes.labels import split_label

KEY = "EDGELM_API_KEY"
Tell = Callable[[int], None]


def is_endpoint(reference: str) -> bool:
    """Whether a reference is an address."""
    return reference.startswith(("http://", "https://"))


class Endpoint:
    """A model behind HTTP.

    An address that ends in ``/v1`` (or ``/v1/embeddings``) speaks OpenAI's protocol, any other
    one text-embeddings-inference's, with ``/ner`` beside it. ``ADDRESS#NAME`` names one of several
    models. A key is taken from the environment, ``EDGELM_API_KEY``.

    Attributes:
        address: Without the model's name.
        model: Name of the model, as it is asked for; empty for the first.
        task: ``embedding``, ``ner`` or ``scoring``.
        labels: In the order of the scores.
        takes_pairs: Whether an input is a pair of texts.
        identity: What the server says of the model.
    """

    def __init__(self, reference: str, timeout: float = 120.0) -> None:
        """Ask the server what it serves.

        Args:
            reference: The address.
            timeout: Seconds to wait for an answer.

        Raises:
            SessionError: It cannot be reached, refuses, or speaks another protocol.
        """
        address, _, self.model = reference.partition("#")
        self.address = address.rstrip("/").removesuffix("/embeddings")
        self._timeout = timeout
        self._batch = 16
        self.labels: tuple[str, ...] = ()
        self.takes_pairs = False
        if urlsplit(self.address).path.endswith("/v1"):
            served = self._get("/models").get("data") or [{}]
            self.model = self.model or str(served[0].get("id", ""))
            self.task, self._openai = "embedding", True
            self.identity: dict[str, Any] = {
                "protocol": "OpenAI",
                "model": self.model,
            }
            return
        self._openai = False
        query = f"?model={quote(self.model)}" if self.model else ""
        info = self._get(f"/info{query}")
        kinds: dict[str, Any] = info.get("model_type") or {}
        self._batch = int(info.get("max_client_batch_size") or self._batch)
        kind = next(iter(kinds), "")
        about = kinds.get(kind) or {}
        if kind not in ("embedding", "classifier", "reranker"):
            raise SessionError(
                f"{self.address}/info names no model_type that edgelm knows (embedding, classifier, reranker). "
                "For OpenAI's protocol give an address that ends in /v1."
            )
        names = about.get("id2label") or {"0": "score"}
        self.labels = tuple(names[i] for i in sorted(names, key=int))
        self.takes_pairs = kind == "reranker"
        tagged = any(split_label(label)[0] in "BESLU" for label in self.labels)
        self.task = "embedding" if kind == "embedding" else "scoring"
        if kind == "classifier" and tagged and "O" in self.labels:
            self.task = "ner"
        self.identity = {
            "protocol": "text-embeddings-inference",
            "model": info.get("model_id"),
            "digest": info.get("model_sha"),
            "precision": info.get("model_dtype"),
            "server": info.get("version"),
        }

    def encode(self, texts: Sequence[str], tell: Tell) -> NDArray[np.float32]:
        """Vectors, float32 ``[n, dimension]``."""
        if not self._openai:
            rows = self._in_batches("/embed", texts, tell)
            return np.array(rows, np.float32)

        def body(batch: Sequence[Any]) -> dict[str, Any]:
            return {"input": list(batch), "model": self.model}

        def read(reply: Any) -> list[Any]:
            data = sorted(reply["data"], key=lambda one: one["index"])
            return [one["embedding"] for one in data]

        rows = self._in_batches("/embeddings", texts, tell, body, read)
        return np.array(rows, np.float32)

    def extract(
        self, texts: Sequence[str], tell: Tell
    ) -> list[list[tuple[int, int, str]]]:
        """Entities of each text: start, end, label."""
        rows = self._in_batches("/ner", texts, tell)
        return [
            [(e["start"], e["end"], e["entity_group"]) for e in entities]
            for entities in rows
        ]

    def score(self, inputs: Sequence[Any], tell: Tell) -> NDArray[np.float32]:
        """Scores, float32 ``[n]`` of one label, else ``[n, labels]``."""
        batches = [[x] if isinstance(x, str) else list(x) for x in inputs]
        rows = self._in_batches("/predict", batches, tell)
        places = {label: i for i, label in enumerate(self.labels)}
        scores = np.full((len(rows), len(self.labels)), np.nan, np.float32)
        for row, found in zip(scores, rows, strict=True):
            for one in found:
                row[places.get(one["label"], 0)] = one["score"]
        return scores[:, 0] if len(self.labels) == 1 else scores

    def _in_batches(
        self,
        route: str,
        inputs: Sequence[Any],
        tell: Tell,
        body: Callable[[Sequence[Any]], dict[str, Any]] | None = None,
        read: Callable[[Any], list[Any]] = list,
    ) -> list[Any]:
        rows: list[Any] = []
        for start in range(0, len(inputs), self._batch):
            batch = inputs[start : start + self._batch]
            asked = body(batch) if body else {"inputs": list(batch), "truncate": True}
            if self.model and body is None:
                asked["model"] = self.model
            try:
                found = read(self._post(route, asked))
            except (KeyError, TypeError) as error:
                raise SessionError(
                    f"{self.address}{route} answers in a form that is not its protocol's."
                ) from error
            if len(found) != len(batch):
                raise SessionError(
                    f"{self.address}{route} gave {len(found)} answers to {len(batch)} inputs."
                )
            rows += found
            tell(len(rows))
        return rows

    def _get(self, route: str) -> dict[str, Any]:
        found = self._ask(urllib.request.Request(self.address + route))
        return found if isinstance(found, dict) else {}

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        data = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return self._ask(urllib.request.Request(self.address + route, data, headers))

    def _ask(self, request: urllib.request.Request) -> Any:
        if key := os.environ.get(KEY):
            request.add_header("authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as reply:
                return json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(2000).decode("utf-8", "replace")
            raise SessionError(
                f"{request.full_url} refuses ({error.code}): {said.strip() or error.reason}"
            ) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise SessionError(
                f"{request.full_url} cannot be reached or gives no JSON ({reason}). Is the server running?"
            ) from error
