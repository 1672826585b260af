"""A tokenizer of whole words w3, w4, ... and a file of sentences of them, for tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.models import VOCABULARY

WORDS = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, VOCABULARY))]


def save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend: Any = Tokenizer(models.WordLevel({word: at for at, word in enumerate(WORDS)}, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def sentences(count: int) -> list[str]:
    """Of 3 to 11 words each, no two alike."""
    return [" ".join(f"w{3 + (7 * at + j * j) % 120}" for j in range(3 + at % 9)) for at in range(count)]
