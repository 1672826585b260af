"""keygen, sign, verify, encrypt, decrypt: exit codes 0, 1, 2, 3, one line of error, and no key in any output."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from ds_compress.cli import app
from tests.secure_folders import encrypted_folder, keys, signed_folder


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result, code: int, words: str) -> None:
    assert result.exit_code == code, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_whole_way(tmp_path: Path) -> None:
    from tests.models import tiny_bert

    os.chdir(tmp_path)
    tiny_bert().save_pretrained("model")
    steps = (
        ("keygen", "release"),
        ("keygen", "reader", "--kind", "encryption"),
        ("sign", "model", "--key", "release.key", "--version", "1"),
        ("verify", "model", "--public-key", "release.pub", "--name", "model", "--seen", "seen.json"),
        ("encrypt", "model", "sealed", "--recipient", "reader.recipient", "--key", "release.key"),
        ("verify", "sealed", "--public-key", "release.pub"),
        ("verify", "sealed", "--public-key", "release.pub", "--identity", "reader.identity"),
        ("decrypt", "sealed", "opened", "--identity", "reader.identity", "--public-key", "release.pub"),
        ("verify", "opened", "--public-key", "release.pub", "--min-version", "1"),
    )
    for step in steps:
        result = invoke(*step)
        assert result.exit_code == 0, (step, result.output)
        assert "PRIVATE" not in result.output and "AGE-SECRET" not in result.output
    assert Path("opened/model.safetensors").read_bytes() == Path("model/model.safetensors").read_bytes()


def test_a_password_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("open sesame\n")
    monkeypatch.setenv("PASSWORD", "open sesame")
    monkeypatch.setenv("WRONG", "open barley")
    folder = signed_folder(tmp_path / "model")
    for kind in ("signing", "encryption"):
        made = invoke("keygen", tmp_path / kind, "--kind", kind, "--password", tmp_path / "password")
        assert made.exit_code == 0
    sign = ("sign", folder, "--key", tmp_path / "signing.key")
    refused(invoke(*sign), 3, "is locked: give its password")
    refused(invoke(*sign, "--password", "env:WRONG"), 3, "the password is wrong")
    refused(invoke(*sign, "--password", "env:NOT_SET"), 3, "empty or not set")
    assert invoke(*sign, "--password", "env:PASSWORD").exit_code == 0
    seal = ("encrypt", folder, tmp_path / "sealed", "--recipient", tmp_path / "encryption.recipient")
    key = ("--key", tmp_path / "signing.key", "--password", "env:PASSWORD")
    assert invoke(*seal, *key).exit_code == 0
    public = ("--public-key", tmp_path / "signing.pub")
    verify = ("verify", tmp_path / "sealed", "--identity", tmp_path / "encryption.identity", *public)
    refused(invoke(*verify), 3, "is locked")
    refused(invoke(*verify, "--password", "env:WRONG"), 3, "the password is wrong")
    assert invoke(*verify, "--password", tmp_path / "password").exit_code == 0


def test_1_is_tampered_or_untrusted(tmp_path: Path) -> None:
    folder = signed_folder(tmp_path / "model")
    public = ("--public-key", keys().signing.public)
    refused(invoke("verify", folder, "--public-key", keys().other.public), 1, "not trusted")
    refused(invoke("verify", folder, *public, "--name", "gpt"), 1, "a release of 'bert', not of 'gpt'")
    refused(invoke("verify", folder, *public, "--min-version", "8"), 1, "a rollback")
    (folder / "config.json").write_text("{}")
    refused(invoke("verify", folder, *public), 1, "changed: config.json")
    refused(
        invoke(
            "encrypt",
            folder,
            tmp_path / "out",
            "--recipient",
            keys().reading.public,
            "--key",
            keys().signing.private,
        ),
        1,
        "changed: config.json",
    )
    sealed = encrypted_folder(tmp_path / "sealed")
    (sealed / "model.safetensors.age").write_bytes(b"age-encryption.org/v1\n")
    opening = ("--identity", keys().reading.private, *public)
    refused(invoke("verify", sealed, *opening), 1, "changed: model.safetensors.age")
    refused(invoke("decrypt", sealed, tmp_path / "out", *opening), 1, "changed: model.safetensors.age")
    (folder / "model.sig").unlink()
    refused(invoke("verify", folder, *public), 1, "is not signed")
    assert not (tmp_path / "out").exists()


def test_2_is_usage(tmp_path: Path) -> None:
    folder = signed_folder(tmp_path / "model")
    public = ("--public-key", keys().signing.public)
    refused(invoke("verify", tmp_path / "nowhere", *public), 2, "is no folder")
    refused(invoke("sign", folder, "--key", keys().signing.private, "--version", "3"), 2, "versions grow")
    refused(invoke("keygen", keys().signing.private.with_suffix("")), 2, "keys are not replaced")
    opening = ("--identity", keys().reading.private, *public)
    refused(invoke("decrypt", folder, tmp_path / "out", *opening), 2, "is not encrypted")
    (tmp_path / "there").mkdir()
    refused(invoke("decrypt", folder, tmp_path / "there", *opening), 2, "exists")
    (tmp_path / "seen.json").write_text("damaged")
    refused(invoke("verify", folder, *public, "--seen", tmp_path / "seen.json"), 2, "is damaged")
    assert invoke("verify", folder).exit_code == 2  # no --public-key
    assert invoke("keygen", tmp_path / "k", "--curve", "P-521").exit_code == 2


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = signed_folder(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "model_signing.verifying", None)
    refused(
        invoke("verify", folder, "--public-key", keys().signing.public),
        2,
        "pip install 'ds_compress[secure]'",
    )


def test_3_is_a_key_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    folder, sealed = signed_folder(tmp_path / "model"), encrypted_folder(tmp_path / "sealed")
    public = ("--public-key", keys().signing.public)
    refused(invoke("verify", folder, "--public-key", tmp_path / "nowhere.pub"), 3, "No such file")
    refused(invoke("verify", folder, "--public-key", "env:NOT_SET"), 3, "empty or not set")
    refused(invoke("sign", folder, "--key", tmp_path / "nowhere.key"), 3, "No such file")
    refused(invoke("sign", folder, "--key", keys().signing.public), 3, "no PEM private key")
    refused(
        invoke("verify", sealed, *public, "--identity", keys().stranger.private),
        3,
        "not encrypted to this identity",
    )
    refused(
        invoke("decrypt", sealed, tmp_path / "out", *public, "--identity", keys().stranger.private),
        3,
        "not encrypted to this identity",
    )
    refused(invoke("sign", folder, "--key", "pkcs11:token=a;object=b?pin-value=987654"), 3, "PKCS#11")
    assert not (tmp_path / "out").exists()


def test_no_output_holds_a_key(tmp_path: Path) -> None:
    """Also where somebody gives the key itself for its name."""
    folder = signed_folder(tmp_path / "model")
    identity = keys().reading.private.read_text().splitlines()[1]
    pem = keys().signing.private.read_text()
    for result in (
        invoke("sign", folder, "--key", pem),
        invoke("sign", folder, "--key", keys().signing.private, "--password", pem),
        invoke("verify", folder, "--public-key", pem),
        invoke("verify", folder, "--public-key", keys().signing.public, "--identity", identity),
        invoke("encrypt", folder, tmp_path / "o", "--recipient", identity, "--key", keys().signing.private),
    ):
        if result.exit_code != 0:
            assert result.exit_code == 3 and "was given itself" in result.stderr
        assert identity[20:40] not in result.output and pem.splitlines()[1][:20] not in result.output
