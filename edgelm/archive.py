"""A bundle as one file, ``.tar.zst``: packed alike every time, read as if it were hostile."""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from edgelm.atomic import new_file
from edgelm.bundle import (
    FILE_NAME,
    MANIFEST,
    MANIFEST_LIMIT,
    SIGNATURE,
    Bundle,
    file_digest,
    open_folder,
    read_manifest,
)
from edgelm.errors import BundleError, EdgelmError, require
from edgelm.manifest import Manifest

if TYPE_CHECKING:
    from edgelm.signing import Trusted

SUFFIX = ".tar.zst"
_MAGIC = b"\x28\xb5\x2f\xfd"
_LEVEL = 19
# A reader needs as much memory; 128 MiB is what every zstd allows unasked.
_WINDOW_LOG = 27
# Unpacked, a bundle may be this much larger than its archive, or `_SMALL`.
_RATIO, _SMALL = 100, 64 << 20
_BLOCK = 1 << 20
SIGNATURE_LIMIT = 4096


@contextmanager
def new_bundle(path: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield a path for a bundle's folder; where ``path`` is to be one file, pack it there.

    Args:
        path: A folder, which whoever makes the bundle replaces or refuses; or a name
            that ends in ``.tar.zst``.
        force: Replace a file that is there already.

    Raises:
        OutputExistsError: The file exists and ``force`` is not set.
        MissingExtraError: zstandard is not installed.
    """
    if not path.name.endswith(SUFFIX):
        yield path
        return
    require("zstandard", "archive")
    with new_file(path, force=force) as file:
        folder = file.with_name("bundle")
        yield folder
        pack(Bundle(folder, open_folder(folder)), file)


def pack(bundle: Bundle, path: Path, *, signature: bytes | None = None) -> None:
    """Write a bundle as one file.

    The manifest stands first, then the signature, if there is one, then the files by name,
    without times or owners: the same bundle and the same zstandard give the same bytes.

    Args:
        bundle: The bundle.
        path: The file to write.
        signature: Content of its signature file; the one that it has, if not given.

    Raises:
        MissingExtraError: zstandard is not installed.
    """
    zstandard = require("zstandard", "archive")
    if signature is None and (bundle.path / SIGNATURE).is_file():
        signature = (bundle.path / SIGNATURE).read_bytes()
    names = [MANIFEST, *sorted(bundle.manifest.files)]
    if signature is not None:
        names.insert(1, SIGNATURE)
    members = []
    for name in names:
        member = tarfile.TarInfo(name)
        if name == SIGNATURE and signature is not None:
            member.size = len(signature)
        else:
            member.size = (bundle.path / name).stat().st_size
        members.append(member)
    padded = sum(512 + -(-member.size // 512) * 512 for member in members) + 1024
    settings = zstandard.ZstdCompressionParameters.from_level(
        _LEVEL,
        source_size=padded,
        window_log=min(_WINDOW_LOG, max(10, padded.bit_length())),
        enable_ldm=True,
        write_checksum=True,
    )
    compressor = zstandard.ZstdCompressor(compression_params=settings)
    with (
        path.open("wb") as raw,
        compressor.stream_writer(raw, size=padded, closefd=False) as out,
    ):
        for member in members:
            out.write(member.tobuf(tarfile.GNU_FORMAT))
            if member.name == SIGNATURE and signature is not None:
                out.write(signature)
            else:
                with (bundle.path / member.name).open("rb") as stream:
                    shutil.copyfileobj(stream, out, _BLOCK)
            out.write(bytes(-member.size % 512))
        out.write(bytes(1024))


def open_archive(path: Path, trusted: Trusted | None = None) -> Bundle:
    """Open a packed bundle: unpacked once, into the user's cache, under its digest.

    Args:
        path: The archive.
        trusted: Public keys, one of which must have signed it.

    Returns:
        The bundle, checked; its ``archive`` is ``path``.

    Raises:
        BundleError: It is no bundle, damaged, or would unpack to more than a bundle
            takes; or there is no place to unpack it.
        MissingExtraError: It has to be unpacked, and zstandard is not installed.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        digest = file_digest(path)
    except OSError as error:
        raise BundleError(f"Cannot read {path}: {error.strerror}.") from error
    if start != _MAGIC:
        raise BundleError(
            f"{path} is not a bundle: it is a file, but no {SUFFIX} archive. "
            f"Make one with: edgelm export CKPT --target cpu -o BUNDLE{SUFFIX}"
        )
    folder = cache_folder() / "bundles" / digest
    if (folder / MANIFEST).is_file():
        try:
            return Bundle(folder, open_folder(folder, trusted), path)
        except BundleError:
            pass  # somebody changed it; the archive is whole
    return Bundle(folder, _unpack(path, folder, trusted), path)


def cache_folder() -> Path:
    """Where edgelm keeps what it can make again, by the XDG base directory specification."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the specification says
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "edgelm"


def _unpack(path: Path, folder: Path, trusted: Trusted | None) -> Manifest:
    """Unpack into a folder of another name, which takes its place when it is whole."""
    zstandard = require("zstandard", "archive")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name[:16]}.", dir=folder.parent))
    except OSError as error:
        raise BundleError(
            f"Cannot unpack {path} to {folder.parent}: {error.strerror}. Set XDG_CACHE_HOME to a folder "
            "that can be written, or unpack it yourself (tar --zstd -xf) and use the folder."
        ) from error
    try:
        reader = zstandard.ZstdDecompressor(
            max_window_size=1 << _WINDOW_LOG
        ).stream_reader(path.open("rb"), closefd=True)
        try:
            with closing(reader):
                _extract(reader, path, work)
        except zstandard.ZstdError as error:
            raise BundleError(
                f"{path} is damaged: {error}. Copy the archive again."
            ) from error
        except OSError as error:
            raise BundleError(
                f"Cannot unpack {path} to {folder.parent}: {error.strerror}."
            ) from error
        manifest = open_folder(work, trusted)
        _take_place(work, folder, trusted)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take_place(work: Path, folder: Path, trusted: Trusted | None) -> None:
    """Rename a whole folder; where another process was quicker, its result is as good."""
    try:
        os.rename(work, folder)
    except OSError:
        try:
            open_folder(folder, trusted)
        except EdgelmError:
            shutil.rmtree(folder)
            os.rename(work, folder)


def _extract(stream: IO[bytes], path: Path, folder: Path) -> None:
    """Take from an archive what its manifest lists, and accept nothing else.

    Headers are read one by one, not by `tarfile.open`, which follows extended headers
    of any size and type before one can look at them.
    """
    first = _header(stream, path)
    if first is None or first.name != MANIFEST or first.size > MANIFEST_LIMIT:
        raise BundleError(
            f"{path} is not a packed bundle: {MANIFEST} is not its first file. "
            f"Pack it with: edgelm export CKPT --target cpu -o BUNDLE{SUFFIX}"
        )
    _copy(stream, path, first, folder)
    files = read_manifest(folder).files
    total = sum(info.size for info in files.values())
    limit = max(_SMALL, _RATIO * path.stat().st_size)
    if total > limit or min((info.size for info in files.values()), default=0) < 0:
        raise BundleError(
            f"{path} says that it unpacks to {total >> 20} MiB, more than {_RATIO} times its own size. "
            "It is not unpacked."
        )
    free = shutil.disk_usage(folder).free
    if total > free:
        raise BundleError(
            f"{path} unpacks to {total >> 20} MiB, and {folder.parent} has {free >> 20} MiB left. "
            "Make room, or set XDG_CACHE_HOME to a larger disk."
        )
    missing, signed = set(files), False
    while (member := _header(stream, path)) is not None:
        name = member.name
        if name == SIGNATURE and not signed and member.size <= SIGNATURE_LIMIT:
            signed = True
            _copy(stream, path, member, folder)
            continue
        if name not in missing or not FILE_NAME.fullmatch(name):
            raise BundleError(
                f"{path} holds {name!r}, which its manifest does not list. It is not unpacked."
            )
        if member.size != files[name].size:
            raise BundleError(
                f"{path} holds {name} with {member.size} bytes instead of {files[name].size}. "
                "Copy the archive again."
            )
        missing.remove(name)
        _copy(stream, path, member, folder)
    if missing:
        raise BundleError(
            f"{path} lacks {min(missing)}, which its manifest lists. Copy the archive again."
        )


def _header(stream: IO[bytes], path: Path) -> tarfile.TarInfo | None:
    """The next file of an archive; None at its end."""
    block = _read(stream, 512, path)
    if block == bytes(512):
        return None
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError) as error:
        raise BundleError(f"{path} is damaged: {error}.") from error
    if member.type != tarfile.REGTYPE:
        raise BundleError(
            f"{path} holds {member.name!r}, which is not a plain file. It is not unpacked."
        )
    return member


def _copy(stream: IO[bytes], path: Path, member: tarfile.TarInfo, folder: Path) -> None:
    left = member.size
    with (folder / member.name).open("xb") as out:
        while left:
            block = _read(stream, min(_BLOCK, left), path)
            out.write(block)
            left -= len(block)
    _read(stream, -member.size % 512, path)


def _read(stream: Any, count: int, path: Path) -> bytes:
    """Exactly so many bytes."""
    parts = []
    while count:
        block: bytes = stream.read(count)
        if not block:
            raise BundleError(f"{path} ends too early. Copy the archive again.")
        parts.append(block)
        count -= len(block)
    return b"".join(parts)
