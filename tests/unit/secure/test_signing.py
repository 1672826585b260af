"""Every change of a signed folder is refused, by the name of the file; so is every signature of others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ds_compress import secure
from ds_compress.secure import TamperedError
from ds_compress.secure.keys import generate
from ds_compress.secure.signing import read_signed
from tests.secure_folders import keys, signed_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one in a folder, signed."""
    root = tmp_path / "model"
    (root / "tokens").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "weights.bin").write_bytes(bytes(range(256)))
    (root / "tokens" / "vocab.txt").write_text("a b c")
    secure.sign(root, keys().signing.private, name="bert", version=7)
    return root


def test_a_signed_folder_is_good(folder: Path) -> None:
    signed = secure.verify(folder, keys().signing.public)
    assert set(signed.digests) == {"config.json", "weights.bin", "tokens/vocab.txt", "release.json"}
    assert signed.release == secure.Release("bert", 7)
    assert "'bert', version 7, 4 files, signed by key" in str(signed)


def flip(root: Path) -> None:
    content = bytearray((root / "weights.bin").read_bytes())
    content[100] ^= 1
    (root / "weights.bin").write_bytes(content)


def swap(root: Path) -> None:
    one, other = root / "config.json", root / "weights.bin"
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1]), other.write_bytes(contents[0])


def link(root: Path) -> None:
    (root.parent / "elsewhere").write_bytes((root / "weights.bin").read_bytes())
    (root / "weights.bin").unlink()
    (root / "weights.bin").symlink_to(root.parent / "elsewhere")


def linked_folder(root: Path) -> None:
    (root / "tokens").rename(root.parent / "tokens")
    (root / "tokens").symlink_to(root.parent / "tokens")


def broken_signature(root: Path) -> None:
    (root / "model.sig").write_text((root / "model.sig").read_text()[:-30])


def foreign_format(root: Path) -> None:
    (root / "model.sig").write_text('{"hello": []}')


def signature_is_a_folder(root: Path) -> None:
    (root / "model.sig").unlink()
    (root / "model.sig").mkdir()


def hidden_in_git(root: Path) -> None:
    (root / ".git").mkdir()
    (root / ".git" / "hook").write_text("evil")


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip": (flip, "changed: weights.bin"),
    "truncate": (lambda root: os.truncate(root / "weights.bin", 255), "changed: weights.bin"),
    "empty": (lambda root: os.truncate(root / "weights.bin", 0), "changed: weights.bin"),
    "missing": (lambda root: (root / "tokens/vocab.txt").unlink(), "missing: tokens/vocab.txt"),
    "extra": (lambda root: (root / "tokens/more.py").write_text("evil"), "added: tokens/more.py"),
    "hidden": (lambda root: (root / ".hidden").write_text("evil"), "added: .hidden"),
    "git": (hidden_in_git, "added: .git/hook"),
    "renamed": (
        lambda root: (root / "weights.bin").rename(root / "w.bin"),
        "missing: weights.bin; added: w.bin",
    ),
    "swapped": (swap, "changed: config.json, weights.bin"),
    "symlink": (link, "symlink"),
    "linked folder": (linked_folder, "symlink"),
    "a fifo": (lambda root: os.mkfifo(root / "pipe"), "special file"),
    "no signature": (lambda root: (root / "model.sig").unlink(), "is not signed: it has no model.sig"),
    "signature cut": (broken_signature, "model.sig is not trusted"),
    "signature of another format": (foreign_format, "model.sig is not trusted"),
    "signature is no text": (lambda root: (root / "model.sig").write_bytes(b"\xff\xfe"), "not trusted"),
    "signature is a folder": (signature_is_a_folder, "is not signed"),
    "nested signature": (lambda root: (root / "tokens/model.sig").write_text(""), "added: tokens/model.sig"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_tampering_is_refused(folder: Path, kind: str) -> None:
    change, words = TAMPERING[kind]
    change(folder)
    with pytest.raises(TamperedError) as caught:
        secure.verify(folder, keys().signing.public)
    assert words in str(caught.value)


def _payload(signature: Path) -> dict[str, object]:
    import base64

    loaded: dict[str, object] = json.loads(
        base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"])
    )
    return loaded


def _with_payload(signature: Path, payload: dict[str, object]) -> None:
    import base64

    bundle = json.loads(signature.read_text())
    bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(payload).encode()).decode()
    signature.write_text(json.dumps(bundle))


def test_a_forged_list_of_files_is_refused(folder: Path) -> None:
    """An attacker changes the hash in the signature, too, and the hash of hashes."""
    import hashlib

    flip(folder)
    payload = _payload(folder / "model.sig")
    resources = payload["predicate"]["resources"]  # type: ignore[index]
    for resource in resources:
        resource["digest"] = hashlib.sha256((folder / resource["name"]).read_bytes()).hexdigest()
    root = hashlib.sha256(b"".join(bytes.fromhex(r["digest"]) for r in resources)).hexdigest()
    payload["subject"][0]["digest"]["sha256"] = root  # type: ignore[index]
    _with_payload(folder / "model.sig", payload)
    with pytest.raises(TamperedError, match="not of this key"):
        secure.verify(folder, keys().signing.public)


def test_another_key_is_refused(folder: Path) -> None:
    with pytest.raises(TamperedError, match="not trusted"):
        secure.verify(folder, keys().other.public)
    secure.sign(folder, keys().other.private)
    with pytest.raises(TamperedError, match="not trusted"):
        secure.verify(folder, keys().signing.public)


def test_a_forged_hint_does_not_make_another_key_good(folder: Path) -> None:
    """The signature names its key by a hash, which anybody may write."""
    from ds_compress.secure.keys import public_key
    from ds_compress.secure.signing import fingerprint

    secure.sign(folder, keys().other.private)
    bundle = json.loads((folder / "model.sig").read_text())
    bundle["verificationMaterial"]["publicKey"]["hint"] = fingerprint(public_key(keys().signing.public))
    (folder / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(TamperedError, match="not of this key"):
        secure.verify(folder, keys().signing.public)


def test_names_of_attackers_are_printable(folder: Path) -> None:
    (folder / "a\x1b[31mb\n").write_text("")
    with open(os.fsencode(folder) + b"/\xff", "wb"):
        pass
    with pytest.raises(TamperedError) as caught:
        secure.verify(folder, keys().signing.public)
    assert str(caught.value).isprintable()
    str(caught.value).encode()


def test_a_link_to_the_folder_is_the_callers_choice(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert secure.verify(tmp_path / "link", keys().signing.public).release is not None


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        secure.verify(tmp_path / "nowhere", keys().signing.public)
    with pytest.raises(FileNotFoundError, match="is no folder"):
        secure.sign(tmp_path / "nowhere", keys().signing.private)


def test_links_are_not_signed(folder: Path) -> None:
    link(folder)
    before = (folder / "model.sig").read_bytes(), (folder / "release.json").read_bytes()
    with pytest.raises(ValueError, match="symlink"):
        secure.sign(folder, keys().signing.private)
    assert before == ((folder / "model.sig").read_bytes(), (folder / "release.json").read_bytes())


@pytest.mark.parametrize("curve", ["P-256", "P-384"])
def test_a_lone_key_with_a_password_signs(folder: Path, tmp_path: Path, curve: str) -> None:
    made = generate(tmp_path / "locked", curve=curve, password=b"open sesame")
    secure.sign(folder, made.private, password=b"open sesame")
    assert secure.verify(folder, made.public).signer


def test_from_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIGNER", keys().signing.private.read_text())
    monkeypatch.setenv("VERIFIER", keys().signing.public.read_text())
    secure.sign(folder, "env:SIGNER", version=8)
    assert secure.verify(folder, "env:VERIFIER").release == secure.Release("bert", 8)


def test_the_commands_of_model_signing_agree(folder: Path) -> None:
    """Its `verify` takes our signature; we take its `sign`, unless files of git lie there, which it leaves out."""
    run = [sys.executable, "-m", "model_signing"]
    public, signature = str(keys().signing.public), str(folder / "model.sig")
    verify = [*run, "verify", "key", str(folder), "--signature", signature, "--public_key", public]
    assert subprocess.run(verify, capture_output=True).returncode == 0
    (folder / "model.sig").unlink()
    sign = [
        *run,
        "sign",
        "key",
        str(folder),
        "--signature",
        signature,
        "--private_key",
        str(keys().signing.private),
    ]
    assert subprocess.run(sign, capture_output=True).returncode == 0
    assert secure.verify(folder, public).release == secure.Release("bert", 7)
    (folder / ".gitattributes").write_text("*.safetensors filter=evil")
    assert subprocess.run(verify, capture_output=True).returncode == 0
    with pytest.raises(TamperedError, match=r"added: \.gitattributes"):
        secure.verify(folder, public)


def test_what_is_read_is_what_was_signed(folder: Path) -> None:
    signed = secure.verify(folder, keys().signing.public)
    assert read_signed(folder, "weights.bin", signed.digests) == bytes(range(256))
    flip(folder)  # after the check
    with pytest.raises(TamperedError, match="changed after it was signed"):
        read_signed(folder, "weights.bin", signed.digests)
    link(folder)
    with pytest.raises(TamperedError, match="cannot be read"):
        read_signed(folder, "weights.bin", signed.digests)


def test_pkcs11_says_what_it_needs_and_shows_no_pin(folder: Path) -> None:
    uri = "pkcs11:token=release;object=key?pin-value=123456&module-path=/nowhere.so"
    with pytest.raises(secure.KeyUnavailableError, match=r"model-signing\[pkcs11\]") as caught:
        secure.sign(folder, uri)
    assert "123456" not in str(caught.value)


SOFT_TOKENS = (
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/softhsm/libsofthsm2.so",
    "/usr/lib64/libsofthsm2.so",
)


def test_a_key_on_a_token_signs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against SoftHSM, where it is installed: apt-get install softhsm2, pip install 'model-signing[pkcs11]'."""
    module = next(
        (path for path in [os.environ.get("SOFTHSM2", ""), *SOFT_TOKENS] if os.path.exists(path)), None
    )
    pytest.importorskip("PyKCS11")
    tool = shutil.which("softhsm2-util")
    if module is None or tool is None:
        pytest.skip("SoftHSM is not installed")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm.conf"))
    made, token = generate(tmp_path / "k"), ["--module", module, "--pin", "123456"]
    subprocess.run(
        [tool, *token, "--init-token", "--free", "--label", "release", "--so-pin", "0000"], check=True
    )
    imported = ["--import", str(made.private), "--token", "release", "--label", "signer", "--id", "01"]
    subprocess.run([tool, *token, *imported], check=True)
    uri = f"pkcs11:token=release;object=signer?pin-value=123456&module-path={module}"
    monkeypatch.setenv("TOKEN", uri)
    for key in (uri, "env:TOKEN"):
        secure.sign(folder, key)
        assert secure.verify(folder, made.public).release is not None
    out, reading = tmp_path / "out", keys().reading
    with pytest.raises(ValueError, match="give the public key"):
        secure.encrypt(folder, out, [reading.public], "env:TOKEN")
    secure.encrypt(folder, out, [reading.public], "env:TOKEN", public_key=made.public)
    assert secure.VerifiedFolder(out, made.public, reading.private).read("weights.bin") == bytes(range(256))
    with pytest.raises(secure.KeyUnavailableError) as caught:
        secure.sign(folder, uri.replace("123456", "654321"))
    assert "654321" not in str(caught.value)


def test_words_of_a_signature_are_printable(folder: Path) -> None:
    bundle = json.loads((folder / "model.sig").read_text())
    bundle["mediaType"] = "\x1b[2J\nds_compress: good"
    (folder / "model.sig").write_text(json.dumps(bundle))
    with pytest.raises(TamperedError, match="not trusted") as caught:
        secure.verify(folder, keys().signing.public)
    assert str(caught.value).isprintable()


def test_a_model_of_transformers_still_loads(tmp_path: Path) -> None:
    from tests.models import tiny_bert

    folder = signed_folder(tmp_path / "model")
    type(tiny_bert()).from_pretrained(folder)
    secure.verify(folder, keys().signing.public)
