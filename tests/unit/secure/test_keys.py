"""Keys come from files and the environment, are made with narrow modes, and are never shown."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ds_compress.secure import keys
from ds_compress.secure.errors import KeyLockedError, KeyUnavailableError


def test_a_signing_key_is_its_owners_alone(tmp_path: Path) -> None:
    made = keys.generate(tmp_path / "release")
    assert (made.private.name, made.public.name) == ("release.key", "release.pub")
    assert made.private.stat().st_mode & 0o777 == 0o600
    private = keys.private_key(made.private)
    assert private.curve.name == "secp256r1"
    assert keys.public_key(made.public) == keys.public_pem(private.public_key())


def test_curves(tmp_path: Path) -> None:
    assert keys.private_key(keys.generate(tmp_path / "a", curve="P-384").private).curve.name == "secp384r1"
    with pytest.raises(ValueError, match="P-256 or P-384"):
        keys.generate(tmp_path / "b", curve="P-521")
    assert not (tmp_path / "b.key").exists()


def test_keys_are_never_replaced(tmp_path: Path) -> None:
    before = keys.generate(tmp_path / "release").private.read_bytes()
    with pytest.raises(FileExistsError, match="not replaced"):
        keys.generate(tmp_path / "release")
    (tmp_path / "other.pub").write_text("somebody's")
    with pytest.raises(FileExistsError):
        keys.generate(tmp_path / "other")
    assert (tmp_path / "release.key").read_bytes() == before
    assert not (tmp_path / "other.key").exists()


@pytest.mark.parametrize("kind", ["signing", "encryption"])
def test_a_password_locks_both_kinds(tmp_path: Path, kind: Any) -> None:
    made = keys.generate(tmp_path / "locked", kind, password=b"open sesame")
    read = keys.private_key if kind == "signing" else keys.identity
    with pytest.raises(KeyLockedError, match="is locked"):
        read(made.private)
    with pytest.raises(KeyUnavailableError, match="password is wrong"):
        read(made.private, b"open barley")
    assert read(made.private, b"open sesame") is not None
    assert b"AGE-SECRET-KEY" not in made.private.read_bytes()
    assert b"BEGIN PRIVATE KEY" not in made.private.read_bytes()


def test_a_password_for_a_key_without_one(tmp_path: Path) -> None:
    made = keys.generate(tmp_path / "release")
    assert keys.private_key(made.private, b"needless").curve.name == "secp256r1"


def test_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signing, reading = keys.generate(tmp_path / "s"), keys.generate(tmp_path / "r", "encryption")
    monkeypatch.setenv("SIGNER", signing.private.read_text())
    monkeypatch.setenv("READER", reading.private.read_text())
    monkeypatch.setenv("PASSWORD", "open sesame\nanother line")
    assert keys.public_pem(keys.private_key("env:SIGNER").public_key()) == keys.public_key(signing.public)
    assert str(keys.identity("env:READER").to_public()) == reading.public.read_text().strip()
    assert keys.read_password("env:PASSWORD") == b"open sesame"
    assert keys.read_password(None) is None
    for name in ("env:NOT_SET", str(tmp_path / "nowhere")):
        with pytest.raises(KeyUnavailableError, match=r"not set|No such file"):
            keys.private_key(name)


def test_recipients_are_public_and_may_be_given_themselves(tmp_path: Path) -> None:
    public = keys.generate(tmp_path / "r", "encryption").public
    text = public.read_text().strip()
    assert str(keys.recipient(public)) == str(keys.recipient(text)) == text
    with pytest.raises(KeyUnavailableError, match="no age1"):
        keys.recipient(keys.generate(tmp_path / "s").public)


@pytest.mark.parametrize(
    "text",
    ["", "no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "AGE-SECRET-KEY-1QQQ"],
)
def test_what_is_no_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file"
    path.write_text(text)
    for read in (keys.private_key, keys.public_key, keys.identity, keys.recipient):
        with pytest.raises(KeyUnavailableError) as caught:
            read(path)
        assert "AAAA" not in str(caught.value) and "QQQ" not in str(caught.value)


def test_other_kinds_of_keys_do_not_sign(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    made: list[Any] = [
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
        ec.generate_private_key(ec.SECP256K1()),
    ]
    for number, key in enumerate(made):
        path = tmp_path / f"{number}"
        path.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        (tmp_path / f"{number}.pub").write_bytes(keys.public_pem(key.public_key()))
        with pytest.raises(KeyUnavailableError, match="no elliptic curve key of P-256"):
            keys.private_key(path)
        with pytest.raises(KeyUnavailableError, match="no elliptic curve key of P-256"):
            keys.public_key(tmp_path / f"{number}.pub")


def test_a_key_given_for_its_name_is_not_shown(tmp_path: Path) -> None:
    made = keys.generate(tmp_path / "r", "encryption")
    secret = next(line for line in made.private.read_text().splitlines() if line.startswith("AGE-SECRET"))
    pem = keys.generate(tmp_path / "s").private.read_text()
    for given in (secret, pem):
        for read in (keys.private_key, keys.public_key, keys.identity, keys.recipient, keys.read_password):
            with pytest.raises(KeyUnavailableError, match="was given itself") as caught:
                read(given)
            assert given not in str(caught.value) and given[30:50] not in str(caught.value)
        assert given[30:50] not in keys.shown_key(given)
    assert "1234" not in keys.shown_key("pkcs11:token=t;object=o?pin-value=1234")


def test_a_key_that_others_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = keys.generate(tmp_path / "release")
    made.private.chmod(0o644)
    with caplog.at_level(logging.WARNING, "ds_compress"):
        keys.private_key(made.private)
        keys.public_key(made.public)
    assert [record.getMessage() for record in caplog.records] == [
        f"{made.private} holds a private key and others may read it: chmod 600"
    ]


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=r"pip install 'ds_compress\[secure\]'"):
        keys.needed("a_module_that_nobody_has")
