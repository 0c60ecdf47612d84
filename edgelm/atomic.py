"""Outputs that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgelm.errors import InputError, OutputExistsError


@contextmanager
def new_folder(path: Path, *, marker: str, force: bool = False) -> Iterator[Path]:
    """Fill a folder beside its final place, then rename it there.

    Args:
        path: Where the folder shall appear.
        marker: Name of a file that every such folder holds. With ``force``, only a folder that holds it is replaced:
            a slip of the keyboard must not delete somebody's home.
        force: Replace what is there already. It stays until the new folder is complete.

    Yields:
        An empty folder on the same file system. On an exception it is removed and ``path`` is left as it was.

    Raises:
        OutputExistsError: ``path`` exists and may not be replaced.
        InputError: The folder that shall hold ``path`` cannot be written.
    """
    check_free(path, marker=marker, force=force)
    work = _beside(path)
    try:
        yield work
        check_free(path, marker=marker, force=force)
        if path.exists():
            aside = _beside(path)
            os.rename(path, aside / "old")
            try:
                os.rename(work, path)
            except OSError:
                os.rename(aside / "old", path)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def new_file(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Write a file beside its final place, then rename it there.

    Args:
        path: Where the file shall appear.
        force: Replace what is there already.

    Yields:
        A path to write to.

    Raises:
        OutputExistsError: ``path`` exists and ``force`` is not set.
        InputError: The folder that shall hold ``path`` cannot be written.
    """
    check_free(path, marker=None, force=force)
    work = _beside(path)
    try:
        yield work / path.name
        os.replace(work / path.name, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_free(path: Path, *, marker: str | None, force: bool) -> None:
    """Raise `OutputExistsError` if ``path`` exists and may not be replaced.

    Args:
        path: Where a folder shall appear, or a file.
        marker: As for `new_folder`; None for a file, which replaces only a file.
        force: Whether something may be replaced.
    """
    if not (path.exists() or path.is_symlink()):
        return
    if not force:
        raise OutputExistsError(_exists(path))
    if marker is None:
        if path.is_dir():
            raise OutputExistsError(
                f"{path} is a folder, which --force does not replace by a file. Choose another output."
            )
        return
    if not (path / marker).is_file() or path.is_symlink():
        raise OutputExistsError(
            f"{path} was not made by edgelm (it holds no {marker}), so --force does not replace it. "
            "Choose another output, or remove it yourself."
        )


def _exists(path: Path) -> str:
    return f"{path} exists already. Choose another output, or replace it with --force."


def _beside(path: Path) -> Path:
    """Make an empty working folder on the same file system as ``path``."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise InputError(
            f"Cannot write to {path.parent}: {error.strerror}. Choose another output."
        ) from error
    work.chmod(0o755)
    return work
