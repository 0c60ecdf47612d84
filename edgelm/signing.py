"""Ed25519 signatures of bundles: who made a bundle, and that nothing in it was changed since.

The signature covers the bytes of the manifest, and the manifest carries the SHA-256 of every other file. What a
device adds later (engines, tuned settings) lies in the user's cache, never in the bundle.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edgelm import schema
from edgelm.archive import SIGNATURE_LIMIT, pack
from edgelm.atomic import new_file
from edgelm.bundle import MANIFEST, SIGNATURE, Bundle
from edgelm.errors import (
    BundleError,
    InputError,
    OutputExistsError,
    SignatureError,
    require,
)
from edgelm.manifest import Manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

FORMAT = "edgelm-signature"
FORMAT_VERSION = 1
# A signature of something else by the same key is no signature of a bundle.
_CONTEXT = b"edgelm bundle manifest, version 1\n"

Trusted = Mapping[str, "Ed25519PublicKey"]


@dataclass(frozen=True)
class Signature:
    """What `signature.json` says.

    Attributes:
        key: Fingerprint of the public key: SHA-256 (hex) of its 32 bytes.
        manifest: SHA-256 (hex) of the bytes of ``manifest.json``.
        signature: Of the context line and these 64 hex digits; base64.
    """

    key: str
    manifest: str
    signature: str


def make_keys(path: Path) -> str:
    """Make a pair of keys: the private one at a path, the public one beside it with ``.pub`` appended.

    Args:
        path: File of the private key, PKCS#8 in PEM, mode 0600.

    Returns:
        The fingerprint of the public key.

    Raises:
        OutputExistsError: One of the two files is there: keys are never replaced.
        InputError: The folder cannot be written.
        MissingExtraError: cryptography is not installed.
    """
    serialization, ed25519 = _library()
    public = path.with_name(path.name + ".pub")
    key = ed25519.Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    private_pem = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public_pem = key.public_key().public_bytes(
        pem, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    made: list[Path] = []
    try:
        for file, data, mode in (
            (path, private_pem, 0o600),
            (public, public_pem, 0o644),
        ):
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
            made.append(file)
            with open(handle, "wb") as stream:
                stream.write(data)
    except OSError as error:
        for written in made:
            written.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise OutputExistsError(
                f"{file} exists already, and keys are never replaced. Choose another name."
            ) from error
        raise InputError(
            f"Cannot write {file}: {error.strerror}. Choose another name."
        ) from error
    return fingerprint(key.public_key())


def fingerprint(key: Ed25519PublicKey) -> str:
    """SHA-256 (hex) of a public key's 32 bytes."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        InputError: The file cannot be read or is no Ed25519 private key in PEM.
        MissingExtraError: cryptography is not installed.
    """
    serialization, ed25519 = _library()
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError as error:
        raise InputError(
            f"{path} is protected by a passphrase, which edgelm cannot ask for. Give a key without one."
        ) from error
    except ValueError as error:
        raise InputError(
            f"{path} is not a private key in PEM. Make one with: edgelm keygen KEY"
        ) from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise InputError(_other_kind(path, key))
    return cast("Ed25519PrivateKey", key)


def read_public_keys(keys: Sequence[str | Path | bytes]) -> Trusted:
    """Read the keys that are trusted.

    Args:
        keys: Files of public keys, or their PEM text as bytes; at least one.

    Returns:
        The keys by fingerprint.

    Raises:
        InputError: There is none, or one is no Ed25519 public key in PEM.
        MissingExtraError: cryptography is not installed.
    """
    if isinstance(keys, (str, bytes, Path)):
        raise InputError("trusted_keys must be a list. Got one key; write [key].")
    if not keys:
        raise InputError(
            "trusted_keys is empty, so no bundle could be opened. Name a public key."
        )
    serialization, ed25519 = _library()
    found: dict[str, Ed25519PublicKey] = {}
    for given in keys:
        name = "The trusted key" if isinstance(given, bytes) else given
        data = given if isinstance(given, bytes) else _read(Path(given))
        if b"PRIVATE KEY-----" in data:
            raise InputError(
                f"{name} is a private key, which belongs on no device. Give the public one beside it (.pub)."
            )
        try:
            key = serialization.load_pem_public_key(data)
        except ValueError as error:
            raise InputError(
                f"{name} is not a public key in PEM. Give the .pub file that edgelm keygen made."
            ) from error
        if not isinstance(key, ed25519.Ed25519PublicKey):
            raise InputError(_other_kind(name, key))
        found[fingerprint(key)] = key
    return found


def sign(bundle: Bundle, key: Ed25519PrivateKey, *, force: bool = False) -> str:
    """Sign a bundle in its place: a folder, or one file, which is packed again.

    Args:
        bundle: A bundle that was opened, so that its files are what its manifest says.
        key: The private key.
        force: Replace a signature that is there already.

    Returns:
        The fingerprint of the key.

    Raises:
        OutputExistsError: It is signed already and ``force`` is not set.
        BundleError: It holds what its manifest does not list.
        InputError: It cannot be written.
    """
    if (bundle.path / SIGNATURE).exists() and not force:
        raise OutputExistsError(
            f"{bundle.name} is signed already. Replace the signature with --force."
        )
    check_nothing_else(bundle.path, bundle.manifest)
    digest = hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()
    made = Signature(
        key=fingerprint(key.public_key()),
        manifest=digest,
        signature=base64.b64encode(key.sign(_message(digest))).decode(),
    )
    about = {"format": FORMAT, "format_version": FORMAT_VERSION, **schema.plain(made)}
    data = (json.dumps(about, indent=2, sort_keys=True) + "\n").encode()
    if bundle.archive is not None:
        with new_file(bundle.archive, force=True) as file:
            pack(bundle, file, signature=data)
        return made.key
    try:
        with tempfile.TemporaryDirectory(
            dir=bundle.path.parent, prefix=f".{bundle.path.name}."
        ) as work:
            whole = Path(work) / SIGNATURE
            whole.write_bytes(data)
            os.replace(whole, bundle.path / SIGNATURE)
    except OSError as error:
        raise InputError(f"Cannot sign {bundle.path}: {error.strerror}.") from error
    return made.key


def check_signature(folder: Path, manifest: bytes, trusted: Trusted) -> str:
    """Check that one of the trusted keys signed a manifest.

    Args:
        folder: The bundle's folder, which holds ``signature.json``.
        manifest: The bytes of its manifest, as they were read.
        trusted: Keys by fingerprint.

    Returns:
        The fingerprint of the key that signed it.

    Raises:
        SignatureError: There is no signature, none of a trusted key, or it is of something else.
    """
    found = read_signature(folder)
    if found.key not in trusted:
        known = ", ".join(sorted(key[:16] for key in trusted))
        raise SignatureError(
            f"{folder} is signed with the key {found.key[:16]}, which is not trusted here. Trusted: {known}."
        )
    from cryptography.exceptions import InvalidSignature

    try:
        raw = base64.b64decode(found.signature, validate=True)
        trusted[found.key].verify(raw, _message(found.manifest))
    except (InvalidSignature, binascii.Error) as error:
        raise SignatureError(
            f"The signature of {folder} is damaged or forged: the key {found.key[:16]} did not make it. "
            "Copy the bundle again from whoever signed it."
        ) from error
    if found.manifest != hashlib.sha256(manifest).hexdigest():
        raise SignatureError(
            f"The signature in {folder} is of another manifest: the bundle was changed after it was signed, or the "
            "signature is another bundle's. Copy the bundle again from whoever signed it."
        )
    return found.key


def check_nothing_else(folder: Path, manifest: Manifest) -> None:
    """Raise `BundleError` if a folder holds what its manifest does not list."""
    for path in sorted(folder.iterdir()):
        own = path.name in (MANIFEST, SIGNATURE) and not path.is_symlink()
        if not own and path.name not in manifest.files:
            raise BundleError(
                f"{folder} holds {path.name}, which its manifest does not list. Remove it, or copy the bundle again."
            )


def read_signature(folder: Path) -> Signature:
    """What a bundle's signature file says, unchecked.

    Raises:
        SignatureError: There is none, or it is no signature.
    """
    path = folder / SIGNATURE
    if path.is_symlink() or not path.is_file():
        raise SignatureError(
            f"{folder} is not signed: it holds no {SIGNATURE}. "
            "Sign it where it was exported: edgelm sign BUNDLE --key KEY"
        )
    with path.open("rb") as stream:
        raw = stream.read(SIGNATURE_LIMIT + 1)
    try:
        data = json.loads(raw) if len(raw) <= SIGNATURE_LIMIT else None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
        raise SignatureError(
            f"{path} is not a signature, or was cut short. Copy the bundle again."
        )
    if data.pop("format_version", None) != FORMAT_VERSION:
        raise SignatureError(
            f"{path} is a signature of another version than {FORMAT_VERSION}. Update edgelm, or sign the bundle again."
        )
    return schema.build(Signature, data, str(path), SignatureError)


def _message(digest: str) -> bytes:
    return _CONTEXT + digest.encode()


def _library() -> tuple[Any, Any]:
    """Modules ``serialization`` and ``ed25519`` of cryptography, which few devices load."""
    base = "cryptography.hazmat.primitives"
    return (
        require(f"{base}.serialization", "sign"),
        require(f"{base}.asymmetric.ed25519", "sign"),
    )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read the key {path}: {error.strerror}.") from error


def _other_kind(name: object, key: object) -> str:
    kind = type(key).__name__.lstrip("_").removesuffix("Key")
    return f"{name} is a key of the kind {kind}; bundles are signed with Ed25519. Make one with: edgelm keygen KEY"
