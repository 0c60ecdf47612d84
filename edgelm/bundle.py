"""Bundle: a folder, or that folder as one file, that a device runs as it is (see docs/bundle-format.md)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgelm import schema
from edgelm.errors import BundleError
from edgelm.manifest import FileInfo, Manifest

if TYPE_CHECKING:
    from edgelm.signing import Trusted

FORMAT = "edgelm-bundle"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
GRAPH, TOKENIZER = "model.onnx", "tokenizer.json"
CODES, HEAD = "codes.safetensors", "head.safetensors"
BUILD = "build.json"
SBOM, SIGNATURE = "sbom.cdx.json", "signature.json"
VECTOR_RANGES = "ranges.safetensors"
# The outputs of a graph that are the vectors of texts, and of their tokens.
POOLED, TOKENS = "sentence_embedding", "token_embeddings"

MANIFEST_LIMIT = 4 << 20
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files have been checked against its manifest.

    Attributes:
        path: The folder of its files; ``manifest``: what its manifest says.
        archive: The file that it was unpacked from, if it was.
    """

    path: Path
    manifest: Manifest
    archive: Path | None = None

    @property
    def name(self) -> str:
        """What it was opened from, for messages."""
        return str(self.archive or self.path)

    def file(self, name: str) -> Path:
        """Path of a file that the manifest names, and so has been checked."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path / MANIFEST} does not list the file {name}.")
        return self.path / name

    @property
    def size_bytes(self) -> int:
        """Size of all its files, manifest and signature included."""
        listed = sum(info.size for info in self.manifest.files.values())
        others = (self.path / MANIFEST, self.path / SIGNATURE)
        return listed + sum(path.stat().st_size for path in others if path.is_file())


def open_bundle(
    path: str | Path, *, trusted_keys: Sequence[str | Path | bytes] | None = None
) -> Bundle:
    """Read a bundle and check every file against the manifest.

    Args:
        path: Its folder, or the bundle as one file (``.tar.zst``), unpacked once, into the user's cache.
        trusted_keys: Public keys, one of which must have signed it; as for `edgelm.load`.

    Raises:
        BundleError: It is no bundle, a newer one than this edgelm reads, or a file is missing,
            damaged or not what the manifest says; of a signed one, also not listed in it.
        SignatureError: None of the trusted keys signed it as it is.
        InputError: A trusted key cannot be used.
        MissingExtraError: One file needs zstandard, keys need cryptography.
    """
    path = Path(path)
    trusted = None
    if trusted_keys is not None:
        from edgelm.signing import read_public_keys

        trusted = read_public_keys(trusted_keys)
    if path.is_file():
        from edgelm.archive import open_archive

        return open_archive(path, trusted)
    return Bundle(path, open_folder(path, trusted))


def is_bundle(path: str | Path) -> bool:
    """Whether something looks like a bundle: a folder with a manifest, or one file."""
    path = Path(path)
    return (path / MANIFEST).is_file() or path.is_file()


def open_folder(path: Path, trusted: Trusted | None = None) -> Manifest:
    """Check a bundle's folder. Errors are those of `open_bundle`."""
    manifest = read_manifest(path, trusted)
    for name, info in manifest.files.items():
        _check_file(path, name, info)
    if trusted is not None:
        from edgelm.signing import check_nothing_else

        check_nothing_else(path, manifest)
    return manifest


def seal(folder: Path, manifest: Manifest) -> Bundle:
    """Write the manifest over the files that are in a folder.

    Args:
        folder: Holds every file of the bundle but the manifest.
        manifest: Its ``files`` are replaced by what the folder holds.
    """
    files = {
        path.name: FileInfo(path.stat().st_size, file_digest(path))
        for path in sorted(folder.iterdir())
        if path.name not in (MANIFEST, SIGNATURE)
    }
    manifest = replace(manifest, files=files)
    data = {
        "format": FORMAT,
        # A reader of version 1 would take a bundle's vectors for its head's logits.
        "format_version": 3 if manifest.heads else 1 if manifest.head is None else 2,
        **schema.plain(manifest),
    }
    data["digest"] = hashlib.sha256(_canonical(data)).hexdigest()
    (folder / MANIFEST).write_bytes(_canonical(data))
    return Bundle(folder, manifest)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _canonical(data: Mapping[str, Any]) -> bytes:
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    return (text + "\n").encode()


def read_manifest(folder: Path, trusted: Trusted | None = None) -> Manifest:
    """Read a manifest, whose files are still to be checked. Errors are those of `open_bundle`."""
    path = folder / MANIFEST
    if not path.is_file():
        what = "does not exist" if not folder.exists() else f"holds no {MANIFEST}"
        raise BundleError(
            f"{folder} is not a bundle: it {what}. Make one with: edgelm export CKPT --target cpu -o BUNDLE"
        )
    if path.stat().st_size > MANIFEST_LIMIT:
        raise BundleError(f"{path} is larger than {MANIFEST_LIMIT >> 20} MiB.")
    raw = path.read_bytes()
    if trusted is not None:
        from edgelm.signing import check_signature

        check_signature(folder, raw, trusted)
    try:
        data = json.loads(raw)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BundleError(
            f"{path} is damaged: it is not JSON ({error}). Copy the bundle again."
        ) from error
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise BundleError(f"{path} is not the manifest of an edgelm bundle.")
    version = data.pop("format_version", None)
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise BundleError(f"{path} states no format version.")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} has bundle format {version}; this edgelm reads up to {FORMAT_VERSION}. "
            "Update edgelm on this device, or export the bundle again with this version."
        )
    digest = data.pop("digest", None)
    body = {"format": FORMAT, "format_version": version, **data}
    expected = hashlib.sha256(_canonical(body)).hexdigest()
    if digest != expected or raw != _canonical({**body, "digest": digest}):
        raise BundleError(
            f"{path} has been changed since it was written. Copy the bundle again."
        )
    return schema.build(Manifest, data, str(path), BundleError, extra=True)


def _check_file(folder: Path, name: str, info: FileInfo) -> None:
    path = folder / name
    if not FILE_NAME.fullmatch(name):
        raise BundleError(
            f"The manifest of {folder} names the file {name!r}, which is not a plain name."
        )
    if path.is_symlink() or not path.is_file():
        raise BundleError(
            f"{path} is missing or not a plain file. Copy the bundle again."
        )
    if path.stat().st_size != info.size:
        raise BundleError(
            f"{path} has {path.stat().st_size} bytes instead of {info.size}. Copy the bundle again."
        )
    if file_digest(path) != info.sha256:
        raise BundleError(
            f"{path} is damaged: its SHA-256 is not the manifest's. Copy the bundle again."
        )
