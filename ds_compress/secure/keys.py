"""Keys: where they come from, and new ones.

A key is named by the path of its file, by `env:NAME` (the variable holds what the file would), or, for signing, by a
PKCS#11 URI (`pkcs11:token=...;object=...`: the key never leaves the token). It is read when it is used and kept
nowhere: no JSON, log or checkpoint holds it.

    kind          private                                            public
    signing       PEM, PKCS#8, elliptic curve P-256, P-384, P-521    PEM, SubjectPublicKeyInfo
    encryption    an age identity, AGE-SECRET-KEY-1...               an age recipient, age1...

Private keys of both kinds may be locked by a password: PKCS#8's own encryption, and age's.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_compress.secure.errors import KeyLockedError, KeyUnavailableError, NotInstalledError

logger = logging.getLogger("ds_compress")

ENVIRONMENT = "env:"
PKCS11 = "pkcs11:"
CURVES = ("P-256", "P-384")
_AGE_FILE = b"age-encryption.org/"
_IDENTITY = re.compile(rb"^AGE-SECRET-KEY-1[0-9A-Z]+$", re.MULTILINE)
_RECIPIENT = re.compile(r"^age1[0-9a-z]+$")
_SECRET = re.compile(r"PRIVATE KEY|AGE-SECRET-KEY", re.IGNORECASE)


@dataclass(frozen=True)
class KeyFiles:
    """The two files of a new key pair."""

    private: Path
    public: Path


def needed(module: str) -> Any:
    """A module of the extra `secure`.

    Raises:
        NotInstalledError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalledError(
            f"signing and encryption need {module}: pip install 'ds_compress[secure]' ({error})"
        ) from error


def looks_secret(text: str) -> bool:
    """Whether a text that should name a key is, or holds, a private one."""
    return bool(_SECRET.search(text))


def shown_key(source: str | os.PathLike[str]) -> str:
    """The name of a key for messages; nothing of it where somebody gave the key itself, or a PIN in a URI."""
    text = os.fspath(source)
    if looks_secret(text) or "\n" in text:
        return "(a key itself, not its name)"
    return PKCS11 + "..." if text.startswith(PKCS11) else text


def read_key(source: str | os.PathLike[str], what: str) -> bytes:
    """The content of a key file, or of the variable that `env:NAME` names. what: for messages, e.g. "public key".

    Raises:
        KeyUnavailableError: there is none, or it is empty.
    """
    text = os.fspath(source)
    if looks_secret(text) or "\n" in text:
        raise KeyUnavailableError(
            f"the {what} was given itself: give the path of its file, or {ENVIRONMENT}NAME"
        )
    if text.startswith(ENVIRONMENT):
        content = os.environ.get(text.removeprefix(ENVIRONMENT), "").encode()
    else:
        try:
            content = Path(text).read_bytes()
        except OSError as error:
            reason = error.strerror or str(error)
            raise KeyUnavailableError(f"{what} {text} cannot be read: {reason}") from None
        _warn_if_others_read(Path(text), content)
    if not content.strip():
        raise KeyUnavailableError(f"{what} {text} is empty or not set")
    return content


def pkcs11_uri(source: str | os.PathLike[str]) -> str | None:
    """The URI of a key on a token, given itself or by `env:NAME`, which keeps a PIN off the command line; else None."""
    text = os.fspath(source)
    if text.startswith(ENVIRONMENT):
        text = os.environ.get(text.removeprefix(ENVIRONMENT), "").strip()
    return text if text.startswith(PKCS11) else None


def read_password(source: str | os.PathLike[str] | None) -> bytes | None:
    """The first line of a password file, or of the variable that `env:NAME` names; None without a source."""
    if source is None:
        return None
    lines = read_key(source, "password").splitlines()
    if not lines[0]:
        raise KeyUnavailableError("the password's first line is empty")
    return lines[0]


def private_key(source: str | os.PathLike[str], password: bytes | None = None) -> Any:
    """The `cryptography` object of a signing key, from a path or the environment.

    Raises:
        KeyUnavailableError: it is missing, damaged, locked, or no elliptic curve key that signs models.
    """
    serialization = needed("cryptography.hazmat.primitives.serialization")
    name = shown_key(source)
    content = read_key(source, "private key")
    try:
        key = serialization.load_pem_private_key(content, password)
    except TypeError:
        if password is None:
            raise KeyLockedError(f"private key {name} is locked: give its password") from None
        key = _read_again(serialization, content, name)
    except Exception:
        # The library's words may quote what it read.
        wrong = "the password is wrong or the file is damaged" if password else "it is no PEM private key"
        raise KeyUnavailableError(f"private key {name} cannot be used: {wrong}") from None
    _refuse_other_curves(key, f"private key {name}")
    return key


def public_key(source: str | os.PathLike[str]) -> bytes:
    """A public signing key as PEM, checked.

    Raises:
        KeyUnavailableError: it is missing, damaged, or no elliptic curve key that signs models.
    """
    serialization = needed("cryptography.hazmat.primitives.serialization")
    name = shown_key(source)
    try:
        key = serialization.load_pem_public_key(read_key(source, "public key"))
    except KeyUnavailableError:
        raise
    except Exception:
        raise KeyUnavailableError(f"public key {name} cannot be used: it is no PEM public key") from None
    _refuse_other_curves(key, f"public key {name}")
    return public_pem(key)


def public_pem(key: Any) -> bytes:
    """SubjectPublicKeyInfo as PEM: the one form that fingerprints are made of."""
    serialization = needed("cryptography.hazmat.primitives.serialization")
    pem: bytes = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return pem


def identity(source: str | os.PathLike[str], password: bytes | None = None) -> Any:
    """An age identity, which decrypts.

    Raises:
        KeyUnavailableError: it is missing, damaged or locked.
    """
    pyrage = needed("pyrage")
    name = shown_key(source)
    content = read_key(source, "identity")
    if content.startswith(_AGE_FILE):
        if password is None:
            raise KeyLockedError(f"identity {name} is locked: give its password")
        try:
            content = pyrage.passphrase.decrypt(content, password.decode())
        except Exception:
            raise KeyUnavailableError(
                f"identity {name} cannot be used: the password is wrong or the file is damaged"
            ) from None
    found = _IDENTITY.search(content)
    if found is None:
        raise KeyUnavailableError(f"identity {name} cannot be used: no line in it begins AGE-SECRET-KEY-1")
    try:
        return pyrage.x25519.Identity.from_str(found[0].decode())
    except Exception:
        raise KeyUnavailableError(f"identity {name} cannot be used: it is damaged") from None


def recipient(source: str | os.PathLike[str]) -> Any:
    """An age recipient, which folders are encrypted to: `age1...` itself, as it is public, or where it stands.

    Raises:
        KeyUnavailableError: it is missing or damaged.
    """
    pyrage = needed("pyrage")
    text = os.fspath(source)
    lines = (
        [text]
        if _RECIPIENT.match(text)
        else read_key(source, "recipient").decode(errors="replace").splitlines()
    )
    found = next((line.strip() for line in lines if _RECIPIENT.match(line.strip())), None)
    try:
        if found is not None:
            return pyrage.x25519.Recipient.from_str(found)
    except Exception:
        pass
    raise KeyUnavailableError(f"recipient {shown_key(source)} cannot be used: it is no age1... key")


def generate(
    out: str | os.PathLike[str],
    kind: Literal["signing", "encryption"] = "signing",
    *,
    curve: str = "P-256",
    password: bytes | None = None,
) -> KeyFiles:
    """Writes a new key pair: `out`.key and `out`.pub to sign with, `out`.identity and `out`.recipient to encrypt with.

    The private file has mode 0600. password: locks it; None leaves it open.

    Raises:
        FileExistsError: a file is there already. Keys are not replaced.
        ValueError: curve is neither P-256 nor P-384.
    """
    base = Path(out)
    ends = (".key", ".pub") if kind == "signing" else (".identity", ".recipient")
    files = KeyFiles(*(base.with_name(base.name + end) for end in ends))
    for path in (files.private, files.public):
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists: keys are not replaced, choose another name")
    private, public = _signing_pair(curve, password) if kind == "signing" else _encryption_pair(password)
    _write_new(files.private, private, 0o600)
    try:
        _write_new(files.public, public, 0o644)
    except BaseException:
        files.private.unlink()
        raise
    return files


def _signing_pair(curve: str, password: bytes | None) -> tuple[bytes, bytes]:
    if curve not in CURVES:
        raise ValueError(f"curve is {curve}: it is {' or '.join(CURVES)}")
    elliptic = needed("cryptography.hazmat.primitives.asymmetric.ec")
    serialization = needed("cryptography.hazmat.primitives.serialization")
    key = elliptic.generate_private_key(elliptic.SECP256R1() if curve == "P-256" else elliptic.SECP384R1())
    lock = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    return private, public_pem(key.public_key())


def _encryption_pair(password: bytes | None) -> tuple[bytes, bytes]:
    pyrage = needed("pyrage")
    key = pyrage.x25519.Identity.generate()
    public = str(key.to_public())
    private = f"# public key: {public}\n{key}\n".encode()
    if password:
        private = pyrage.passphrase.encrypt(private, password.decode())
    return private, f"{public}\n".encode()


def _write_new(path: Path, content: bytes, mode: int) -> None:
    # Created with its mode: there is no moment in which others can open it.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _read_again(serialization: Any, content: bytes, name: str) -> Any:
    """A password was given for a key that has none: the key is as good without."""
    try:
        return serialization.load_pem_private_key(content, None)
    except Exception:
        raise KeyUnavailableError(f"private key {name} cannot be used: it is damaged") from None


def _refuse_other_curves(key: Any, what: str) -> None:
    curve = getattr(getattr(key, "curve", None), "name", None)
    if curve not in ("secp256r1", "secp384r1", "secp521r1"):
        raise KeyUnavailableError(f"{what} is no elliptic curve key of P-256, P-384 or P-521")


def _warn_if_others_read(path: Path, content: bytes) -> None:
    if looks_secret(content[:200].decode(errors="replace")) and path.stat().st_mode & 0o077:
        logger.warning("%s holds a private key and others may read it: chmod 600", path)
