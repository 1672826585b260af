"""Commands for keys, signatures and encryption. Exit status: 0 good, 1 tampered or untrusted, 2 usage, 3 key missing
or locked."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ds_compress.cli.output import AsJson, output

if TYPE_CHECKING:
    from ds_compress.secure.signing import Signed

_KEY = "path, env:NAME or pkcs11: URI of the private key"
_PASSWORD = "path or env:NAME of the key's password; asked for at a terminal"
_PUBLIC = "path or env:NAME of the signer's public key"
_SEEN = "JSON file of yours that remembers versions: an older one than was seen is refused"


class KeyKind(StrEnum):
    """What a key is for."""

    SIGNING = "signing"
    ENCRYPTION = "encryption"


class Curve(StrEnum):
    """Of a signing key."""

    P256 = "P-256"
    P384 = "P-384"


def keygen(
    out: Annotated[Path, typer.Argument(help="name of the two files, without their endings")],
    kind: Annotated[
        KeyKind, typer.Option(help="signing: .key and .pub; encryption: .identity and .recipient")
    ] = (KeyKind.SIGNING),
    curve: Annotated[Curve, typer.Option(help="of a signing key")] = Curve.P256,
    password: Annotated[
        str | None, typer.Option(help="path or env:NAME of a password that locks the private key")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Makes a key pair to sign with, or to encrypt to."""
    with output(as_json) as printed:
        from ds_compress.secure import keys

        made = keys.generate(out, kind.value, curve=curve.value, password=keys.read_password(password))
        printed.say(f"keep secret: {made.private}")
        printed.say(f"hand out:    {made.public}")
        printed.done(private=str(made.private), public=str(made.public))


def sign(
    folder: Annotated[Path, typer.Argument(help="with a model, a checkpoint's tag or a teacher cache")],
    key: Annotated[str, typer.Option(help=_KEY)],
    password: Annotated[str | None, typer.Option(help=_PASSWORD)] = None,
    name: Annotated[str | None, typer.Option(help="of the model through its releases")] = None,
    version: Annotated[
        int | None, typer.Option(min=0, help="higher than the last; by default seconds since 1970")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Signs a folder: release.json and model.sig beside the weights."""
    with output(as_json) as printed:
        from ds_compress import secure

        _with_password(
            lambda given: secure.sign(folder, key, password=given, name=name, version=version), password
        )
        printed.say(f"signed: {folder}")
        printed.done(folder=str(folder))


def verify(
    folder: Annotated[Path, typer.Argument(help="a signed folder")],
    public_key: Annotated[str, typer.Option(help=_PUBLIC)],
    identity: Annotated[
        str | None, typer.Option(help="path or env:NAME: also decrypts, to memory, and checks the plaintext")
    ] = None,
    password: Annotated[str | None, typer.Option(help="path or env:NAME of the identity's password")] = None,
    name: Annotated[str | None, typer.Option(help="of the model that it has to be")] = None,
    min_version: Annotated[
        int | None, typer.Option(min=0, help="the lowest version that is accepted")
    ] = None,
    seen: Annotated[Path | None, typer.Option(help=_SEEN)] = None,
    as_json: AsJson = False,
) -> None:
    """Checks that every file of a folder is what its signer signed."""
    with output(as_json) as printed:
        from ds_compress import secure

        asked: dict[str, Any] = {"name": name, "min_version": min_version, "seen": seen}
        if identity is None:
            signed = secure.verify(folder, public_key, **asked)
            printed.say(f"good: {signed}")
            printed.done(**_signed(signed), plaintext=False)
            return
        opened = _with_password(
            lambda given: secure.VerifiedFolder(folder, public_key, identity, password=given, **asked),
            password,
        )
        for file in opened.names:
            opened.read(file)
        printed.say(f"good: {opened.signed}{', and its plaintext' if opened.is_encrypted else ''}")
        printed.done(**_signed(opened.signed), plaintext=opened.is_encrypted)


def encrypt(
    folder: Annotated[Path, typer.Argument(help="a signed folder")],
    out: Annotated[Path, typer.Argument(help="folder to write; must not exist")],
    recipient: Annotated[
        list[str], typer.Option(help="age1... key, or path or env:NAME of one; may be repeated")
    ],
    key: Annotated[str, typer.Option(help=_KEY + ", which has signed the folder")],
    password: Annotated[str | None, typer.Option(help=_PASSWORD)] = None,
    public_key: Annotated[str | None, typer.Option(help="of a pkcs11: key")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Encrypts the weights of a signed folder, and signs the result."""
    with output(as_json) as printed:
        from ds_compress import secure

        _with_password(
            lambda given: secure.encrypt(
                folder, out, recipient, key, password=given, public_key=public_key, overwrite=overwrite
            ),
            password,
        )
        printed.say(f"encrypted and signed: {out}")
        printed.done(folder=str(out))


def decrypt(
    folder: Annotated[Path, typer.Argument(help="an encrypted folder")],
    out: Annotated[Path, typer.Argument(help="folder to write the plaintext to; must not exist")],
    identity: Annotated[str, typer.Option(help="path or env:NAME of the age identity")],
    public_key: Annotated[str, typer.Option(help=_PUBLIC)],
    password: Annotated[str | None, typer.Option(help="path or env:NAME of the identity's password")] = None,
    name: Annotated[str | None, typer.Option(help="of the model that it has to be")] = None,
    min_version: Annotated[
        int | None, typer.Option(min=0, help="the lowest version that is accepted")
    ] = None,
    seen: Annotated[Path | None, typer.Option(help=_SEEN)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT")] = False,
    as_json: AsJson = False,
) -> None:
    """Verifies and decrypts a folder to disk. To load a model, load_verified needs no such copy."""
    with output(as_json) as printed:
        from ds_compress import secure

        _with_password(
            lambda given: secure.decrypt(
                folder,
                out,
                identity,
                public_key,
                password=given,
                name=name,
                min_version=min_version,
                seen=seen,
                overwrite=overwrite,
            ),
            password,
        )
        printed.say(f"decrypted: {out}")
        printed.done(folder=str(out))


def _signed(signed: Signed) -> dict[str, Any]:
    release = signed.release
    return {
        "folder": str(signed.folder),
        "name": release.name if release else None,
        "version": release.version if release else None,
        "files": len(signed.digests),
        "signer": signed.signer,
    }


def _with_password(run: Any, source: str | None) -> Any:
    """`run(password)`; without a source it is asked for where a key turns out to be locked and somebody sits there."""
    from ds_compress.secure import keys
    from ds_compress.secure.errors import KeyLockedError

    if source is not None:
        return run(keys.read_password(source))
    try:
        return run(None)
    except KeyLockedError:
        if not sys.stdin.isatty():
            raise
    return run(typer.prompt("password", hide_input=True, err=True).encode())
