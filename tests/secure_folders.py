"""A small model's folder, signed, and encrypted; and the two key pairs that it was done with."""

from __future__ import annotations

import atexit
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from ds_compress import secure
from ds_compress.secure.keys import KeyFiles
from tests.models import tiny_bert


@dataclass(frozen=True)
class Keys:
    """signing, other: two signers. reading, stranger: two readers."""

    signing: KeyFiles
    other: KeyFiles
    reading: KeyFiles
    stranger: KeyFiles


@cache
def keys() -> Keys:
    """Made once for all tests of a process."""
    folder = Path(mkdtemp(prefix="ds_compress_keys_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Keys(
        secure.generate(folder / "release"),
        secure.generate(folder / "other"),
        secure.generate(folder / "reader", "encryption"),
        secure.generate(folder / "stranger", "encryption"),
    )


def signed_folder(folder: Path, version: int = 7) -> Path:
    """A model of transformers with weights in safetensors, signed as version 7 of "bert"."""
    tiny_bert().save_pretrained(folder)
    secure.sign(folder, keys().signing.private, name="bert", version=version)
    return folder


def encrypted_folder(folder: Path, version: int = 7) -> Path:
    """The same, encrypted to `reading`; the plaintext stays beside it as `<folder>-plain`."""
    plain = signed_folder(folder.with_name(folder.name + "-plain"), version)
    return secure.encrypt(plain, folder, [keys().reading.public], keys().signing.private)
