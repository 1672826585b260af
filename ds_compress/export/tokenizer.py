"""The tokenizer beside the weights."""

from __future__ import annotations

import shutil
from os import PathLike
from pathlib import Path
from typing import Any

from ds_compress.errors import ExportError

_FILES = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.spm",
    "spiece.model",
    "chat_template*",
    "preprocessor_config.json",
)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Saves an object with `save_pretrained`, or copies the tokenizer's files from a folder; None: nothing.

    Raises:
        ExportError: the folder has none.
    """
    if tokenizer is None:
        return
    if not isinstance(tokenizer, str | PathLike):
        tokenizer.save_pretrained(folder)
        return
    files = [file for pattern in _FILES for file in Path(tokenizer).glob(pattern)]
    if not files:
        raise ExportError(f"{tokenizer} has no tokenizer files")
    for file in files:
        shutil.copy2(file, folder / file.name)
