"""The calibration set: lines of text, or rows of a .jsonl with labels, in batches."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_compress.distill.text_data import padded, read_examples

Batch = dict[str, torch.Tensor]
_SHORTEST = 1


@dataclass(frozen=True)
class Example:
    """ids: token ids. label: class, or None."""

    ids: list[int]
    label: int | None = None


def read_calibration(
    path: Path,
    tokenizer: Any,
    *,
    examples: int | None = None,
    max_length: int = 512,
    column: str = "text",
    labels: str | None = None,
    seed: int = 0,
) -> list[Example]:
    """At most `examples` of a file, chosen by `seed`; None: all, in their order.

    labels: column of a .jsonl with the class of each row, a whole number.

    Raises:
        ValueError: a line without text, ids or label; or nothing to read.
    """
    texts = list(read_examples(path, column))
    classes: Sequence[int | None] = [None] * len(texts)
    if labels is not None:
        classes = list(_labels(path, labels))
    rows = list(zip(texts, classes, strict=True))
    if examples is not None and examples < len(rows):
        rows = random.Random(seed).sample(rows, examples)
    made = []
    for text, label in rows:
        ids = text if isinstance(text, list) else tokenizer(text)["input_ids"]
        if not all(isinstance(token, int) for token in ids):
            raise ValueError(f'{path}: token ids in column "{column}" are whole numbers')
        if len(ids) >= _SHORTEST:
            made.append(Example(ids[:max_length], label))
    if not made:
        raise ValueError(f"{path} has no example with a token")
    return made


def batches(examples: Sequence[Example], size: int, pad_id: int | None) -> list[Batch]:
    """`input_ids` and `attention_mask` int64 [at most `size`, tokens], padded on the right; with classes, `labels`."""
    made = []
    for at in range(0, len(examples), size):
        part = examples[at : at + size]
        batch = padded([list(example.ids) for example in part], pad_id)
        if part[0].label is not None:
            batch["labels"] = torch.tensor([example.label for example in part])
        made.append(batch)
    return made


def _labels(path: Path, column: str) -> Iterator[int]:
    if path.suffix == ".txt":
        raise ValueError(f"{path}: lines of text have no labels: give a .jsonl")
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            value = json.loads(line).get(column)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f'{path}, line {number}: no class (0, 1, ...) in column "{column}"')
            yield value
