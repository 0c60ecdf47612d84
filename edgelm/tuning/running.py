"""Evaluations side by side: in processes of this machine, or as tasks of a Ray cluster.

Both give ``(number of the job, result)`` in whatever order they end; the search puts them in order, so that the
order changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from edgelm.runtimes.index.cluster import RETRIES, join
from edgelm.tuning.space import Configuration
from edgelm.tuning.trial import Fidelity, Problem, evaluate_trial

Job = tuple[Configuration, Fidelity]
Results = Iterator[tuple[int, dict[str, Any]]]
Run = Callable[[Problem, Sequence[Job]], Results]


@contextmanager
def processes(workers: int) -> Iterator[Run]:
    """Run evaluations in processes of this machine.

    A process that ends (killed, out of memory) takes the others of its pool with it; all evaluations that were
    under way are then done again, each alone, and what ends its process twice has failed.

    Args:
        workers: How many at once.
    """
    context = multiprocessing.get_context("spawn")

    def pool(count: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            count, mp_context=context, initializer=_end_with_parent
        )

    current = [pool(workers)]

    def run(problem: Problem, jobs: Sequence[Job]) -> Results:
        lost = []
        futures = {
            current[0].submit(evaluate_trial, problem, *job): i
            for i, job in enumerate(jobs)
        }
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except BrokenProcessPool:
                lost.append(futures[future])
        for i in sorted(lost):
            with pool(1) as alone:
                again: Future[dict[str, Any]] = alone.submit(
                    evaluate_trial, problem, *jobs[i]
                )
                try:
                    yield i, again.result()
                except BrokenProcessPool:
                    yield i, {"error": "The process of the evaluation ended twice."}
        if lost:
            current[0].shutdown(wait=False)
            current[0] = pool(workers)

    try:
        yield run
    finally:
        current[0].shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Let a worker not outlive what started it, however that ended."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def cluster(address: str, cpus: float) -> Iterator[Run]:
    """Run evaluations on a Ray cluster.

    An evaluation whose worker is lost is given to another one. Checkpoints lie in the problem's folder, which
    all workers have to see; the problem itself is sent once.

    Args:
        address: As for `edgelm.runtimes.index.cluster.join`.
        cpus: CPUs that an evaluation counts as; fractions let more of them share one.

    Raises:
        InputError: There is no cluster at the address.
        MissingExtraError: Ray is not installed.
    """
    with join(address) as ray:
        errors = ray.exceptions
        remote = ray.remote(num_cpus=cpus, max_retries=RETRIES)(evaluate_trial)

        def run(problem: Problem, jobs: Sequence[Job]) -> Results:
            shared = ray.put(problem)
            waiting = {remote.remote(shared, *job): i for i, job in enumerate(jobs)}
            while waiting:
                (done, *_), _ = ray.wait(list(waiting), num_returns=1)
                i = waiting.pop(done)
                try:
                    found = ray.get(done)
                except errors.RayTaskError as error:
                    raise error.as_instanceof_cause() from error
                except errors.RayError as error:
                    reason = str(error).strip().splitlines()[0]
                    said = f"Lost with each of {RETRIES + 1} workers: {reason}"
                    found = {"error": said}
                yield i, found

        yield run
