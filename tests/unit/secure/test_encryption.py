"""Encrypted folders: readable by their reader, signed inside and outside, and no plaintext beside them."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ds_compress import secure
from ds_compress.secure import KeyUnavailableError, TamperedError, VerifiedFolder
from ds_compress.secure.signing import signing_config, write_signature
from tests.secure_folders import encrypted_folder, keys

_written: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _written is not None:
        path, mode, flags = arguments
        if flags & (os.O_WRONLY | os.O_RDWR) or (isinstance(mode, str) and set(mode) & set("wax+")):
            _written.append(os.fsdecode(path) if isinstance(path, str | bytes) else f"descriptor {path}")


sys.addaudithook(_hook)


@contextmanager
def writes() -> Iterator[list[str]]:
    """The files that Python opens for writing inside of the block."""
    global _written
    _written = []
    try:
        yield _written
    finally:
        _written = None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return encrypted_folder(tmp_path / "model")


def plain_of(folder: Path) -> Path:
    return folder.with_name(folder.name + "-plain")


def test_what_is_in_it(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors.age",
        "model.sig",
        "plaintext.sig",
        "release.json",
    ]
    assert (folder / "model.safetensors.age").read_bytes().startswith(b"age-encryption.org/v1")
    assert secure.verify(folder, keys().signing.public).release == secure.Release("bert", 7)


def test_it_comes_back_byte_by_byte(folder: Path, tmp_path: Path) -> None:
    out = secure.decrypt(folder, tmp_path / "out", keys().reading.private, keys().signing.public)
    plain = plain_of(folder)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in plain.iterdir()
    }
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o600}
    assert secure.verify(out, keys().signing.public).release == secure.Release("bert", 7)


def test_other_programs_of_age_read_it(folder: Path) -> None:
    import pyrage

    identity = pyrage.x25519.Identity.from_str(keys().reading.private.read_text().splitlines()[1])
    content = pyrage.decrypt((folder / "model.safetensors.age").read_bytes(), [identity])
    assert content == (plain_of(folder) / "model.safetensors").read_bytes()


def test_several_readers(tmp_path: Path) -> None:
    plain = plain_of(encrypted_folder(tmp_path / "model"))
    readers = [keys().reading.public, keys().stranger.public.read_text().strip()]
    both = secure.encrypt(plain, tmp_path / "both", readers, keys().signing.private)
    for reader in (keys().reading, keys().stranger):
        opened = VerifiedFolder(both, keys().signing.public, reader.private)
        assert opened.read("model.safetensors") == (plain / "model.safetensors").read_bytes()


def test_the_wrong_reader_and_none(folder: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="is encrypted: give the identity"):
        VerifiedFolder(folder, keys().signing.public)
    with pytest.raises(KeyUnavailableError, match="not encrypted to this identity"):
        VerifiedFolder(folder, keys().signing.public, keys().stranger.private).read("model.safetensors")


def test_encrypting_writes_no_plaintext(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    plain = plain_of(encrypted_folder(tmp_path / "first"))
    secret = (plain / "model.safetensors").read_bytes()[-64:]
    with writes() as opened:
        secure.encrypt(plain, tmp_path / "out", [keys().reading.public], keys().signing.private)
    ours = (str(tmp_path / ".out"), "/proc/self/fd/", "descriptor ")
    assert opened and not [path for path in opened if not path.startswith(ours)]
    assert not [path for path in opened if path.endswith(".safetensors")]
    found = [path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()]
    assert sorted(path.parent for path in found) == [plain]
    assert not list(temporary.iterdir())


def test_reading_writes_nothing_at_all(folder: Path) -> None:
    secure.load_verified(folder, keys().signing.public, keys().reading.private)  # imports write caches
    with writes() as opened:
        secure.load_verified(folder, keys().signing.public, keys().reading.private)
    assert not [
        path for path in opened if not path.startswith(("/proc/self/fd/", "descriptor ", "/dev/null"))
    ]


def test_a_killed_or_failed_encryption_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ds_compress.secure import encryption

    plain = plain_of(encrypted_folder(tmp_path / "model"))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(encryption.signing, "write_signature", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        secure.encrypt(plain, tmp_path / "out", [keys().reading.public], keys().signing.private)
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_not_encrypted(folder: Path, tmp_path: Path) -> None:
    plain, to, key = plain_of(folder), [keys().reading.public], keys().signing.private
    with pytest.raises(FileExistsError, match="exists"):
        secure.encrypt(plain, folder, to, key)
    with pytest.raises(ValueError, match="no recipient"):
        secure.encrypt(plain, tmp_path / "out", [], key)
    with pytest.raises(ValueError, match="encrypted already"):
        secure.encrypt(folder, tmp_path / "out", to, key)
    with pytest.raises(ValueError, match="is not encrypted"):
        secure.decrypt(plain, tmp_path / "out", keys().reading.private, keys().signing.public)
    with pytest.raises(TamperedError):
        secure.encrypt(plain, tmp_path / "out", to, keys().other.private)
    (plain / "model.sig").unlink()
    with pytest.raises(TamperedError, match="is not signed"):
        secure.encrypt(plain, tmp_path / "out", to, key)
    assert not (tmp_path / "out").exists()


def test_nothing_else_is_replaced(folder: Path, tmp_path: Path) -> None:
    """Neither what nobody here wrote, nor the plaintext, nor anything around them."""
    plain, to, key = plain_of(folder), [keys().reading.public], keys().signing.private
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "link").symlink_to(folder)
    for out, error in (
        (tmp_path / "mine", FileExistsError),
        (tmp_path / "link", FileExistsError),
        (plain, ValueError),
        (plain / "sealed", ValueError),
        (tmp_path, ValueError),
    ):
        with pytest.raises(error):
            secure.encrypt(plain, out, to, key, overwrite=True)
    opening = keys().reading.private, keys().signing.public
    for out, error in (
        (tmp_path / "mine", FileExistsError),
        (folder, ValueError),
        (folder / "open", ValueError),
        (tmp_path, ValueError),
    ):
        with pytest.raises(error):
            secure.decrypt(folder, out, *opening, overwrite=True)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    secure.verify(plain, keys().signing.public)
    secure.verify(folder, keys().signing.public)
    secure.decrypt(folder, plain, *opening, overwrite=True)
    secure.verify(plain, keys().signing.public)


def test_overwrite_replaces(folder: Path) -> None:
    plain = plain_of(folder)
    secure.encrypt(plain, folder, [keys().stranger.public], keys().signing.private, overwrite=True)
    VerifiedFolder(folder, keys().signing.public, keys().stranger.private).read("model.safetensors")


def resigned(folder: Path) -> None:
    """The signer signs whatever lies there: only the plaintext's signature is left to find what is wrong."""
    write_signature(folder, signing_config(keys().signing.private))


def another_plaintext(folder: Path) -> None:
    """Anybody can encrypt to a public key."""
    import pyrage

    to = pyrage.x25519.Recipient.from_str(keys().reading.public.read_text().strip())
    (folder / "model.safetensors.age").write_bytes(pyrage.encrypt(b"other weights", [to]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (another_plaintext, "holds another plaintext than was signed"),
        (lambda folder: (folder / "config.json").write_text("{}"), "is not of the plaintext"),
        (lambda folder: (folder / "model.safetensors.age").unlink(), "is not of the plaintext"),
        (
            lambda folder: (folder / "more.json").write_text("{}"),
            "files beside the signed plaintext: more.json",
        ),
        (
            lambda folder: (folder / "model.safetensors.age").rename(folder / "model.safetensors"),
            "is not of the plaintext",
        ),
    ],
)
def test_the_inner_signature_holds(folder: Path, change: Any, words: str) -> None:
    change(folder)
    with pytest.raises(TamperedError):
        secure.verify(folder, keys().signing.public)
    resigned(folder)
    with pytest.raises(TamperedError, match=words):
        VerifiedFolder(folder, keys().signing.public, keys().reading.private).read("model.safetensors")


def test_a_foreign_inner_signature_is_refused(folder: Path) -> None:
    plain = plain_of(folder)
    secure.sign(plain, keys().other.private)
    shutil.copy(plain / "model.sig", folder / "plaintext.sig")
    resigned(folder)
    with pytest.raises(TamperedError, match="not trusted"):
        VerifiedFolder(folder, keys().signing.public, keys().reading.private)


def test_a_changed_ciphertext_is_never_decrypted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyrage

    another_plaintext(folder)
    monkeypatch.setattr(pyrage, "decrypt", lambda *_: pytest.fail("decrypted what nobody signed"))
    with pytest.raises(TamperedError, match=r"changed: model\.safetensors\.age"):
        secure.load_verified(folder, keys().signing.public, keys().reading.private)


def test_changed_between_the_check_and_the_reading(folder: Path) -> None:
    opened = VerifiedFolder(folder, keys().signing.public, keys().reading.private)
    another_plaintext(folder)
    with pytest.raises(TamperedError, match="changed after it was signed"):
        opened.read("model.safetensors")


def test_what_is_not_known_to_be_text_is_encrypted(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    (plain / "sub").mkdir(parents=True)
    names = [
        "config.json",
        "README.md",
        "vocab.txt",
        "chat.jinja",
        "model.onnx",
        "sub/optim.pt",
        "tokenizer.model",
    ]
    for name in names:
        (plain / name).write_text(name)
    secure.sign(plain, keys().signing.private)
    out = secure.encrypt(plain, tmp_path / "out", [keys().reading.public], keys().signing.private)
    encrypted = {path.relative_to(out).as_posix() for path in out.rglob("*.age")}
    assert encrypted == {"model.onnx.age", "sub/optim.pt.age", "tokenizer.model.age"}
    opened = VerifiedFolder(out, keys().signing.public, keys().reading.private)
    assert {name: opened.read(name).decode() for name in names} == {name: name for name in names}
    with pytest.raises(FileNotFoundError):
        opened.read("../plain/config.json")
