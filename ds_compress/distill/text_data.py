"""Examples from text files, as a teacher reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ds_compress.errors import nearest


def read_examples(path: Path, column: str = "text") -> Iterator[str | list[int]]:
    """The examples of a file: each line of a .txt, or `column` (text or token ids) of each line of a .jsonl.

    Raises:
        ValueError: a line that is no JSON object with that column; names the line, and the column that it may mean.
    """
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if path.suffix == ".txt":
                yield line.rstrip("\n")
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            value = row.get(column) if isinstance(row, dict) else None
            if not isinstance(value, str | list):
                close = nearest(column, row) if isinstance(row, dict) else None
                hint = f'; did you mean "{close}"?' if close else ""
                raise ValueError(f'{path}, line {number}: no text or token ids in column "{column}"{hint}')
            yield value


def token_batches(
    examples: Iterator[str | list[int]], tokenizer: Any, max_length: int, batch: int
) -> Iterator[dict[str, torch.Tensor]]:
    """`input_ids` and `attention_mask` int64 [at most `batch`, tokens], padded to the longest of each batch."""
    waiting: list[list[int]] = []
    for example in examples:
        ids = example if isinstance(example, list) else tokenizer(example)["input_ids"]
        waiting.append(ids[:max_length])
        if len(waiting) == batch:
            yield padded(waiting, tokenizer.pad_token_id)
            waiting = []
    if waiting:
        yield padded(waiting, tokenizer.pad_token_id)


def padded(rows: list[list[int]], pad_id: int | None) -> dict[str, torch.Tensor]:
    """One batch, padded on the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id or 0)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask}
