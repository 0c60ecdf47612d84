"""Signatures: only what a trusted key signed, as it was then, is opened."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

import edgelm
from edgelm.archive import SUFFIX, cache_folder, pack
from edgelm.bundle import MANIFEST, SIGNATURE, _canonical, open_bundle, seal
from edgelm.cli import cli
from edgelm.errors import (
    BundleError,
    EdgelmError,
    InputError,
    OutputExistsError,
    SignatureError,
)
from edgelm.runtimes.service.models import open_models
from edgelm.signing import make_keys, read_private_key, sign

PEM = serialization.Encoding.PEM


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def key(tmp_path: Path) -> Path:
    make_keys(tmp_path / "release.key")
    return tmp_path / "release.key"


@pytest.fixture
def pub(key: Path) -> Path:
    return key.with_name("release.key.pub")


@pytest.fixture
def signed(tiny_bundle: Path, key: Path) -> Path:
    sign(open_bundle(tiny_bundle), read_private_key(key))
    return tiny_bundle


def private_pem(key: object) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(PEM, form, serialization.NoEncryption())  # type: ignore[attr-defined]


def public_pem(key: object) -> bytes:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(PEM, form)  # type: ignore[attr-defined]


def test_a_signed_bundle_opens_and_runs_with_its_key(signed: Path, pub: Path) -> None:
    model = edgelm.load(signed, trusted_keys=[pub])
    assert model.encode(["the man"]).shape == (1, 32)  # type: ignore[union-attr]
    assert edgelm.load(signed, trusted_keys=[pub.read_bytes()])
    assert edgelm.load(open_bundle(signed), trusted_keys=[str(pub)])
    edgelm.load(signed)  # whoever does not ask is not bothered
    size = sum(p.stat().st_size for p in signed.iterdir())
    assert open_bundle(signed).size_bytes == size


def test_one_of_several_trusted_keys_will_do(
    signed: Path, pub: Path, tmp_path: Path
) -> None:
    make_keys(tmp_path / "next")
    open_bundle(signed, trusted_keys=[tmp_path / "next.pub", pub])
    with pytest.raises(SignatureError, match="is not trusted here"):
        open_bundle(signed, trusted_keys=[tmp_path / "next.pub"])


def test_an_unsigned_bundle_is_refused(tiny_bundle: Path, pub: Path) -> None:
    with pytest.raises(SignatureError, match="is not signed"):
        edgelm.load(tiny_bundle, trusted_keys=[pub])
    with pytest.raises(SignatureError, match="is not signed"):
        edgelm.load(open_bundle(tiny_bundle), trusted_keys=[pub])


def test_a_flipped_bit_in_any_file_is_refused(signed: Path, pub: Path) -> None:
    files = sorted(signed.iterdir())
    assert {SIGNATURE, MANIFEST, "model.onnx", "tokenizer.json"} <= {
        p.name for p in files
    }
    for path in files:
        original = path.read_bytes()
        for place in (0, len(original) // 2, len(original) - 1):
            data = bytearray(original)
            data[place] ^= 4
            path.write_bytes(bytes(data))
            with pytest.raises(BundleError):
                open_bundle(signed, trusted_keys=[pub])
        path.write_bytes(original)
    open_bundle(signed, trusted_keys=[pub])


def test_a_file_replaced_as_a_careful_forger_would_is_refused(
    signed: Path, pub: Path
) -> None:
    """With its digest in the manifest and the manifest's own digest made anew."""
    manifest = open_bundle(signed).manifest
    (signed / "golden.jsonl").write_text('{"text": "other"}\n', encoding="utf-8")
    seal(signed, manifest)
    open_bundle(signed)  # consistent in itself
    with pytest.raises(SignatureError, match="of another manifest"):
        open_bundle(signed, trusted_keys=[pub])


@pytest.mark.parametrize("what", ["manifest", "signature"])
def test_parts_of_another_bundle_by_the_same_key_are_refused(
    signed: Path, pub: Path, key: Path, bundles: Callable[..., Path], what: str
) -> None:
    other = shutil.copytree(bundles("scorer"), signed.with_name("other"))
    sign(open_bundle(other), read_private_key(key))
    name = MANIFEST if what == "manifest" else SIGNATURE
    shutil.copyfile(other / name, signed / name)
    with pytest.raises(SignatureError, match="of another manifest"):
        open_bundle(signed, trusted_keys=[pub])


def test_both_swapped_leave_files_that_are_not_the_manifests(
    signed: Path, pub: Path, key: Path, bundles: Callable[..., Path]
) -> None:
    other = shutil.copytree(bundles("scorer"), signed.with_name("other"))
    sign(open_bundle(other), read_private_key(key))
    for name in (MANIFEST, SIGNATURE):
        shutil.copyfile(other / name, signed / name)
    with pytest.raises(BundleError):
        open_bundle(signed, trusted_keys=[pub])


def test_the_stated_digest_is_signed_too(signed: Path, pub: Path) -> None:
    """A forger who writes the digest of a forged manifest into the signature file."""
    import hashlib

    manifest = open_bundle(signed).manifest
    (signed / "golden.jsonl").write_text('{"text": "other"}\n', encoding="utf-8")
    seal(signed, manifest)
    data = json.loads((signed / SIGNATURE).read_text(encoding="utf-8"))
    forged = hashlib.sha256((signed / MANIFEST).read_bytes()).hexdigest()
    data["manifest"] = forged
    (signed / SIGNATURE).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SignatureError, match="damaged or forged"):
        open_bundle(signed, trusted_keys=[pub])


def test_a_signature_by_another_key_that_claims_to_be_ours_is_refused(
    signed: Path, pub: Path, tmp_path: Path
) -> None:
    ours = json.loads((signed / SIGNATURE).read_text(encoding="utf-8"))["key"]
    make_keys(tmp_path / "theirs")
    private = read_private_key(tmp_path / "theirs")
    sign(open_bundle(signed), private, force=True)
    data = json.loads((signed / SIGNATURE).read_text(encoding="utf-8"))
    data["key"] = ours
    (signed / SIGNATURE).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(SignatureError, match="damaged or forged"):
        open_bundle(signed, trusted_keys=[pub])


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"",
        lambda raw: b"[]",
        lambda raw: b"[" * 4000,
        lambda raw: b"\xff\xfe",
        lambda raw: raw + b" " * 5000,
        lambda raw: raw.replace(b'"format_version": 1', b'"format_version": 2'),
        lambda raw: raw.replace(b'"key"', b'"kez"'),
        lambda raw: raw.replace(b'"signature": "', b'"signature": "!'),
    ],
)
def test_a_signature_file_that_is_none_is_refused(
    signed: Path, pub: Path, change: Callable[[bytes], bytes]
) -> None:
    path = signed / SIGNATURE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SignatureError):
        open_bundle(signed, trusted_keys=[pub])


def test_what_the_manifest_does_not_list_is_refused(signed: Path, pub: Path) -> None:
    extra = signed / "model.onnx.data"
    extra.write_bytes(b"x")
    open_bundle(signed)
    with pytest.raises(BundleError, match=r"model\.onnx\.data, which its manifest"):
        open_bundle(signed, trusted_keys=[pub])
    extra.unlink()
    (signed / "folder").mkdir()
    with pytest.raises(BundleError, match="folder, which its manifest"):
        open_bundle(signed, trusted_keys=[pub])


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST, SIGNATURE])
def test_a_link_in_the_place_of_a_file_is_refused(
    signed: Path, pub: Path, tmp_path: Path, name: str
) -> None:
    shutil.move(signed / name, tmp_path / "outside")
    (signed / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError):
        open_bundle(signed, trusted_keys=[pub])


def test_a_link_to_the_whole_bundle_is_taken(
    signed: Path, pub: Path, tmp_path: Path
) -> None:
    (tmp_path / "current").symlink_to(signed)
    open_bundle(tmp_path / "current", trusted_keys=[pub])


def test_what_is_not_whole_is_not_signed(tiny_bundle: Path, key: Path) -> None:
    (tiny_bundle / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(BundleError, match=r"notes\.txt"):
        sign(open_bundle(tiny_bundle), read_private_key(key))
    assert not (tiny_bundle / SIGNATURE).exists()


def test_a_signature_is_replaced_only_when_asked(
    signed: Path, key: Path, tmp_path: Path
) -> None:
    before = (signed / SIGNATURE).read_bytes()
    private = read_private_key(key)
    with pytest.raises(OutputExistsError, match="signed already"):
        sign(open_bundle(signed), private)
    sign(open_bundle(signed), private, force=True)
    assert (signed / SIGNATURE).read_bytes() == before  # Ed25519 is deterministic


def test_an_archive_is_signed_and_refused_like_a_folder(
    tiny_bundle: Path, key: Path, pub: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"tiny{SUFFIX}"
    pack(open_bundle(tiny_bundle), path)
    unsigned = path.read_bytes()
    with pytest.raises(SignatureError, match="is not signed"):
        edgelm.load(path, trusted_keys=[pub])
    sign(open_bundle(path), read_private_key(key))
    assert path.read_bytes() != unsigned
    edgelm.load(path, trusted_keys=[pub])
    opened = open_bundle(path, trusted_keys=[pub])
    again = tmp_path / f"again{SUFFIX}"
    pack(opened, again)  # the signature goes along, and the bytes are the same
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(OutputExistsError):
        sign(open_bundle(path), read_private_key(key))


@pytest.mark.parametrize("where", [2, 3])
def test_an_archive_with_two_signatures_or_a_long_one_is_refused(
    signed: Path, tmp_path: Path, where: int
) -> None:
    import io
    import tarfile

    import zstandard

    names = [MANIFEST, SIGNATURE, *sorted(open_bundle(signed).manifest.files)]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in [*names[:where], SIGNATURE, *names[where:]]:
            data = (signed / name).read_bytes()
            if name == SIGNATURE and where == 3:
                data += b" " * 5000
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    path = tmp_path / f"tiny{SUFFIX}"
    path.write_bytes(zstandard.compress(out.getvalue()))
    with pytest.raises(BundleError, match=SIGNATURE):
        open_bundle(path)


def test_an_unpacked_archive_that_was_changed_is_unpacked_again(
    signed: Path, pub: Path, tmp_path: Path, bundles: Callable[..., Path]
) -> None:
    """Another whole bundle in the cache's place is not what was signed."""
    path = tmp_path / f"tiny{SUFFIX}"
    pack(open_bundle(signed), path)
    folder = open_bundle(path, trusted_keys=[pub]).path
    assert folder.is_relative_to(cache_folder())
    shutil.rmtree(folder)
    shutil.copytree(bundles("scorer"), folder)
    opened = open_bundle(path, trusted_keys=[pub])
    assert opened.manifest.task == "embedding"
    assert (opened.path / MANIFEST).read_bytes() == (signed / MANIFEST).read_bytes()
    (opened.path / "more").write_text("x", encoding="utf-8")
    assert not (open_bundle(path, trusted_keys=[pub]).path / "more").exists()


def test_keys_are_private_and_never_replaced(key: Path, pub: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert b"PRIVATE" in key.read_bytes()
    assert b"PUBLIC" in pub.read_bytes()
    before = key.read_bytes(), pub.read_bytes()
    with pytest.raises(OutputExistsError, match="never replaced"):
        make_keys(key)
    key.unlink()
    with pytest.raises(OutputExistsError, match="never replaced"):
        make_keys(key)
    assert not key.exists()
    assert pub.read_bytes() == before[1]
    with pytest.raises(InputError, match="Cannot write"):
        make_keys(key.parent / "nowhere" / "key")


def test_keys_of_other_kinds_are_named(signed: Path, tmp_path: Path) -> None:
    strange = tmp_path / "strange"
    for other in (
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256R1()),
    ):
        with pytest.raises(InputError, match="Ed25519"):
            open_bundle(signed, trusted_keys=[public_pem(other)])
        strange.write_bytes(private_pem(other))
        with pytest.raises(InputError, match="Ed25519"):
            read_private_key(strange)
    ours = ed25519.Ed25519PrivateKey.generate()
    with pytest.raises(InputError, match="is a private key"):
        open_bundle(signed, trusted_keys=[private_pem(ours)])
    strange.write_bytes(public_pem(ours))
    with pytest.raises(InputError, match="not a private key"):
        read_private_key(strange)
    locked = serialization.BestAvailableEncryption(b"secret")
    strange.write_bytes(
        ours.private_bytes(PEM, serialization.PrivateFormat.PKCS8, locked)
    )
    with pytest.raises(InputError, match="passphrase"):
        read_private_key(strange)
    with pytest.raises(InputError, match="not a public key"):
        open_bundle(signed, trusted_keys=[b"hello"])
    with pytest.raises(InputError, match="Cannot read the key"):
        open_bundle(signed, trusted_keys=[tmp_path / "nothing"])


def test_trusting_nobody_is_no_way_to_trust_everybody(signed: Path, pub: Path) -> None:
    with pytest.raises(InputError, match="empty"):
        edgelm.load(signed, trusted_keys=[])
    with pytest.raises(InputError, match="must be a list"):
        edgelm.load(signed, trusted_keys=str(pub))


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    return result.exit_code, result.output


def test_the_commands(tiny_bundle: Path, tmp_path: Path) -> None:
    key, pub = tmp_path / "k", tmp_path / "k.pub"
    assert run("keygen", key)[0] == 0
    assert run("keygen", key)[0] == 1
    assert run("verify-signature", tiny_bundle, "--trusted-key", pub)[0] == 3
    assert run("sign", tiny_bundle, "--key", pub)[0] == 1
    assert run("sign", tiny_bundle, "--key", key)[0] == 0
    assert run("sign", tiny_bundle, "--key", key)[0] == 1
    code, text = run("verify-signature", tiny_bundle, "--trusted-key", pub, "--json")
    assert code == 0
    assert json.loads(text.split("\n")[0])["key"] in run(
        "sign", tiny_bundle, "--key", key, "--force"
    )[1].replace("\n", "")
    assert run("verify", tiny_bundle, "--trusted-key", pub)[0] == 0
    code, text = run("run", tiny_bundle, "the man", "--trusted-key", pub)
    assert code == 0
    assert len(json.loads(text)["embedding"]) == 32
    data = json.loads((tiny_bundle / MANIFEST).read_text(encoding="utf-8"))
    (tiny_bundle / MANIFEST).write_bytes(_canonical({**data, "task": "ner"}))
    for args in (("run", tiny_bundle, "the man"), ("verify", tiny_bundle)):
        code, text = run(*args, "--trusted-key", pub)
        assert code == 3
        assert "another manifest" in text


def test_half_a_pair_of_keys_does_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second file cannot be written: its name is too long, the first's is not."""
    name = "k" * 253
    with pytest.raises(InputError, match="Cannot write"):
        make_keys(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_service_opens_what_is_signed(signed: Path, pub: Path) -> None:
    options = {"max_batch_tokens": None, "max_queue": 4, "trusted_keys": [pub]}
    (served,) = open_models([str(signed)], **options)  # type: ignore[arg-type]
    assert served.name == signed.name
    (signed / SIGNATURE).unlink()
    with pytest.raises(SignatureError):
        open_models([str(signed)], **options)  # type: ignore[arg-type]


def test_serve_refuses_before_it_listens(tiny_bundle: Path, pub: Path) -> None:
    code, text = run("serve", tiny_bundle, "--port", "0", "--trusted-key", pub)
    assert code == 3
    assert "is not signed" in text


def test_every_refusal_is_an_error_of_edgelm() -> None:
    assert issubclass(SignatureError, EdgelmError)
    assert SignatureError.exit_code == 3
