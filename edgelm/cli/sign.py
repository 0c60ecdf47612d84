"""Commands about signatures: keygen, sign, verify-signature."""

from __future__ import annotations

from pathlib import Path

import click

from edgelm.cli.console import emit, say

PATH = click.Path(path_type=Path)
TRUSTED_KEY = click.option(
    "--trusted-key",
    "trusted_keys",
    type=PATH,
    multiple=True,
    metavar="PUB",
    help="Open the bundle only if this public key signed it; repeatable. Without it, no signature is asked for.",
)


@click.command()
@click.argument("key", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def keygen(key: Path, as_json: bool) -> None:
    """Make a pair of Ed25519 keys: KEY, which stays secret, and KEY.pub, which devices trust.

    \b
    edgelm keygen release.key
    """
    from edgelm.signing import make_keys

    fingerprint = make_keys(key)
    public = f"{key}.pub"
    if as_json:
        emit({"private": str(key), "public": public, "key": fingerprint})
    say(f"{key}: private, keep it secret. {public}: public, for devices.")
    say(f"fingerprint {fingerprint}")


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, required=True, help="The private key.")
@click.option(
    "--force", is_flag=True, help="Replace a signature that is there already."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def sign(bundle: Path, key: Path, force: bool, as_json: bool) -> None:
    """Sign BUNDLE, a folder or a .tar.zst: its manifest, and so every file in it.

    \b
    edgelm sign bundle --key release.key
    """
    from edgelm.bundle import open_bundle
    from edgelm.signing import read_private_key
    from edgelm.signing import sign as sign_bundle

    private = read_private_key(key)
    fingerprint = sign_bundle(open_bundle(bundle), private, force=force)
    if as_json:
        emit({"bundle": str(bundle), "key": fingerprint})
    say(f"{bundle} is signed with the key {fingerprint}")


@click.command("verify-signature")
@click.argument("bundle", type=PATH)
@click.option(
    "--trusted-key",
    "trusted_keys",
    type=PATH,
    multiple=True,
    required=True,
    metavar="PUB",
    help="A public key that may have signed it; repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
def verify_signature(
    bundle: Path, trusted_keys: tuple[Path, ...], as_json: bool
) -> None:
    """Check that a trusted key signed BUNDLE and that it is as it was then.

    Exit code 3 where no trusted key signed it as it is, 1 where a file is damaged or does not belong.

    \b
    edgelm verify-signature bundle --trusted-key release.key.pub
    """
    from edgelm.bundle import open_bundle
    from edgelm.signing import read_signature

    opened = open_bundle(bundle, trusted_keys=trusted_keys)
    fingerprint = read_signature(opened.path).key
    if as_json:
        emit({"bundle": str(bundle), "key": fingerprint})
    count = len(opened.manifest.files) + 1
    say(
        f"{bundle} is as it was signed with the trusted key {fingerprint}: {count} files"
    )


COMMANDS = {"keygen": keygen, "sign": sign, "verify-signature": verify_signature}
