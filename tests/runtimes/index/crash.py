"""Kills children that change an index, and looks at what they leave; run by test_durability.

    python crash.py lines INDEX FIRST STRIDE     at lines of code that a batch of each kind runs through
    python crash.py moments INDEX SEED ROUNDS    at random moments of many batches

A child writes a byte to a pipe for every batch that has been acknowledged to it.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.runtimes.index import BinaryIndex, Writer

Expected = dict[str, int]


def code(number: int) -> Any:
    return np.frombuffer(number.to_bytes(4, "big"), np.uint8)[None]


def add(writer: Writer, held: Expected, ids: list[str], first: int) -> None:
    """Add or replace."""
    codes = np.concatenate([code(first + i) for i in range(len(ids))])
    writer.add(ids, codes, texts=[f"text {i}" for i in ids], replace_existing=True)
    held.update({name: first + i for i, name in enumerate(ids)})


def check(path: Path, allowed: list[Expected]) -> Expected:
    """Which of the states that may be there is there; and that it goes on from there."""
    index = BinaryIndex(path)
    index.verify()
    found: Expected = {}
    snapshot = index._snapshot
    for row in range(snapshot.manifest.rows):
        if not snapshot.is_deleted(np.array([row]))[0]:
            ((name, text),) = snapshot.read(np.array([row]))
            assert text == f"text {name}"
            found[name] = int.from_bytes(snapshot.codes[row].tobytes(), "big")
    assert found in allowed, (found, allowed)
    with index.writer() as writer:  # the lock died with its owner
        add(writer, dict(found), ["after"], 99)
        writer.delete(["after"])
    index.refresh()
    index.verify()
    assert len(index) == len(found)
    sizes = {p.name: p.stat().st_size for p in snapshot.path("codes").parent.iterdir()}
    assert sizes == {n: s.size for n, s in index.manifest.files.items()}
    return found


def acknowledged(
    work: Callable[[int], None], kill_after: int | None = None, delay_s: float = 0
) -> int:
    """Run work(pipe) in a child; how many batches were acknowledged before it ended.

    With ``kill_after`` it is killed some time after that many batches.
    """
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        work(into)
        os._exit(0)
    os.close(into)
    count = 0
    if kill_after is not None:
        while count < kill_after:
            count += len(os.read(out, 1))
        until = time.perf_counter() + delay_s
        while time.perf_counter() < until:
            pass
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(out, 1 << 16):
        count += len(data)
    os.close(out)
    return count


def killed_at_line(operation: Callable[[Writer], None], path: Path, last: int) -> bool:
    """Kill a child at the last-th line of the index's code; whether it was done before."""

    def work(pipe: int) -> None:
        lines = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal lines
            if "/runtimes/index/" not in frame.f_code.co_filename:
                return None
            lines += event == "line"
            if lines == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        with Writer(path) as writer:
            operation(writer)
            sys.settrace(None)
            os.write(pipe, b".")

    return acknowledged(work) == 1


def at_lines(path: Path, first: int, stride: int) -> Iterator[str]:
    """Every stride-th line that a batch of each kind runs through."""
    held: Expected = {}
    with BinaryIndex.create(path, 32).writer() as writer:
        add(writer, held, ["a", "b", "c", "d"], 1)
        writer.delete(["b"])
    del held["b"]
    operations: dict[str, tuple[Callable[[Writer], None], Expected]] = {
        "add": (lambda w: add(w, {}, ["e", "a"], 7), {**held, "e": 7, "a": 8}),
        "delete": (lambda w: w.delete(["d"]), {"a": 1, "c": 3}),
        "compact": (lambda w: w.compact(), held),
    }
    for name, (operation, result) in operations.items():
        for last in itertools.count(first, stride):
            copy = path.with_name(f"{name}-{last}")
            shutil.copytree(path, copy)
            done = killed_at_line(operation, copy, last)
            check(copy, [result] if done else [held, result])
            shutil.rmtree(copy)
            if done:
                yield f"{name}: killed up to line {last - stride}"
                break


def plan(seed: str) -> Iterator[tuple[str, list[str], int]]:
    """Batches without end: kind, ids, first code."""
    dice = random.Random(seed)
    while True:
        names = {f"n{dice.randrange(60)}" for _ in range(dice.randint(1, 8))}
        kind = dice.choice(["add", "add", "delete", "compact"])
        yield kind, sorted(names), dice.randrange(1 << 30)


def after(state: Expected, kind: str, names: list[str], first: int) -> Expected:
    """What an index holds after a batch."""
    if kind == "add":
        return {**state, **{name: first + i for i, name in enumerate(names)}}
    return {n: v for n, v in state.items() if kind != "delete" or n not in names}


def carry_out(path: Path, state: Expected, seed: str, pipe: int) -> None:
    """Batch after batch, until killed."""
    with Writer(path) as writer:
        for kind, names, first in plan(seed):
            if kind == "add":
                add(writer, {}, names, first)
            elif kind == "delete":
                writer.delete([name for name in names if name in state])
            else:
                writer.compact()
            os.write(pipe, b".")
            state = after(state, kind, names, first)


def at_moments(path: Path, seed: int, rounds: int) -> Iterator[str]:
    """One index through many deaths at random moments."""
    dice = random.Random(seed)
    BinaryIndex.create(path, 32)
    held: Expected = {}
    batches = 0
    for i in range(rounds):
        name = f"{seed} {i}"
        done = acknowledged(
            partial(carry_out, path, held, name),
            dice.randint(1, 6),
            dice.random() / 400,
        )
        states = [held]
        for batch in itertools.islice(plan(name), done + 1):
            states.append(after(states[-1], *batch))
        held = check(path, states[done:])  # all that was acknowledged; perhaps one more
        batches += done
    yield f"{rounds} deaths, {batches} acknowledged batches, all there"


if __name__ == "__main__":
    mode, folder, *numbers = sys.argv[1:]
    run = {"lines": at_lines, "moments": at_moments}[mode]
    for line in run(Path(folder), *map(int, numbers)):
        print(line)
