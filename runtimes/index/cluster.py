"""Texts to codes on a Ray cluster; in order, so that the index is the one that a single machine makes.

Tasks of Ray and not Ray Data: batches must be the same as locally and come back in order, so that a build can be
resumed behind its last line, and no more of them may be on their way than there is work for. That is a queue of tasks;
Ray Data would bring its own reading and batching, and its repeats of lost tasks are those of Ray's tasks.
"""

from __future__ import annotations

import socket
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from edgelm.bundle import Bundle, open_bundle
from edgelm.errors import InputError, require
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import open_engine
from edgelm.runtimes.index.encoding import Documents, TextEncoder

# How often a batch is given to another worker when its worker is lost.
RETRIES = 5
_CONNECT_SECONDS = 10.0


class ClusterEncoder:
    """The encoder of an index, whose work is done by the workers of a Ray cluster.

    Attributes:
        bits: Width of its codes.
        dimension: Length of its vectors.
        info: What ties an index to it.
    """

    def __init__(self, ray: Any, bundle: Bundle, encoder: TextEncoder) -> None:
        """Send the bundle to the cluster; `connect` does it.

        Args:
            ray: The module, connected.
            bundle: What the workers open; they need edgelm, and no files of their own.
            encoder: The same bundle, opened here.
        """
        self.bits, self.dimension = encoder.bits, encoder.dimension
        self.info = encoder.info
        self._ray = ray
        files = {p.name: p.read_bytes() for p in bundle.path.iterdir() if p.is_file()}
        self._files = ray.put(files)
        self._encode = ray.remote(num_cpus=1, max_retries=RETRIES)(encode_batch)
        # Enough that no worker waits, and no more texts in memory than that.
        self._ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def stream(self, batches: Iterable[Sequence[str]]) -> Iterator[Documents]:
        """Encode batches of documents; they come back in order.

        Raises:
            InputError: A batch was lost with every worker that tried it.
        """
        digest, waiting = self.info.digest, deque[Any]()
        for texts in batches:
            waiting.append(self._encode.remote(self._files, digest, list(texts)))
            if len(waiting) >= self._ahead:
                yield self._get(waiting.popleft())
        while waiting:
            yield self._get(waiting.popleft())

    def _get(self, reference: Any) -> Documents:
        what_then = "What is encoded is kept; the same command goes on."
        found: Documents = fetch(self._ray, reference, what_then)
        return found


def fetch(ray: Any, reference: Any, what_then: str) -> Any:
    """What a task gave.

    Args:
        ray: The module, connected.
        reference: Of the task.
        what_then: A sentence on what to do where it was lost.

    Raises:
        InputError: It was lost with every worker that tried it.
        EdgelmError: What the task raised.
    """
    errors = ray.exceptions
    try:
        return ray.get(reference)
    except errors.RayTaskError as error:
        raise error.as_instanceof_cause() from error
    except errors.RayError as error:
        raise InputError(
            f"A batch was lost with each of the {RETRIES + 1} workers that tried it: "
            f"{str(error).strip().splitlines()[0]} {what_then}"
        ) from error


@contextmanager
def connect(
    address: str, bundle: Bundle, encoder: TextEncoder
) -> Iterator[ClusterEncoder]:
    """Connect to a Ray cluster for a build.

    Args:
        address: As for `join`.
        bundle: What shall encode.
        encoder: The same, opened.

    Raises:
        EdgelmError: What `join` refuses.
    """
    with join(address) as ray:
        yield ClusterEncoder(ray, bundle, encoder)


@contextmanager
def join(address: str) -> Iterator[Any]:
    """Connect to a Ray cluster. What is printed until the end goes to stderr, as Ray prints on stdout.

    Args:
        address: ``host:port``, ``auto`` for the cluster of this machine, ``local`` to start
            one here that ends with the work.

    Yields:
        The module ray, connected.

    Raises:
        InputError: There is no cluster at the address.
        MissingExtraError: Ray is not installed.
    """
    ray = require("ray", "ray")
    _check_address(address)
    with redirect_stdout(sys.stderr):
        try:
            ray.init(address, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0].rstrip(".")
            raise InputError(
                f"Cannot join a Ray cluster at {address}: {reason}. "
                "Start one with: ray start --head. If it asks for a token, set RAY_AUTH_TOKEN."
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def encode_batch(files: dict[str, bytes], digest: str, texts: list[str]) -> Documents:
    """What a worker does with a batch."""
    if digest not in _OPENED:
        with tempfile.TemporaryDirectory(prefix="edgelm-bundle-") as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            engine = open_engine(open_bundle(folder), threads=1)
        _OPENED[digest] = TextEncoder(Embedder(engine))
    return _OPENED[digest].documents(texts)


# Of a worker's process: it opens the bundle once.
_OPENED: dict[str, TextEncoder] = {}


def _check_address(address: str) -> None:
    """Say at once that nobody listens: Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"There is no Ray cluster at {address}: {error}. Start one with: ray start --head"
        ) from error
