"""Models and tokenizers from folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ExportError


def skeleton(folder: Path) -> nn.Module:
    """The class that a transformers folder names, on the meta device.

    Raises:
        ExportError: the folder has no config, or transformers no such class.
    """
    import transformers

    if not (folder / "config.json").exists():
        raise ExportError(f"{folder} has no config.json")
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ExportError(f"{folder}/config.json names no class of transformers in architectures: {names}")
    with torch.device("meta"):
        model: nn.Module = cls(config)
    return model


def stored_model(name: str) -> Any:
    """With its weights, of the class of transformers that its config names.

    Raises:
        ValueError: it names none.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(name)
    names = config.architectures or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise ValueError(f"{name}: its config names no class of transformers in architectures: {names}")
    return cls.from_pretrained(name)


def tokenizer_of(name: str) -> Any:
    """Of a folder or a name."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(name)
