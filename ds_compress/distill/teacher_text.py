"""Text that a teacher writes, to distil it where there is no data.

The student then learns from the teacher's own distribution (Kim & Rush 2016, sequence-level distillation): sampled
at temperature 1 it covers all that the teacher says, and no label is needed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ds_compress.distill.text_data import padded


@torch.no_grad()
def teacher_text(
    model: Any,
    prompts: Sequence[list[int]],
    samples: int,
    tokens: int,
    *,
    pad_id: int,
    temperature: float = 1.0,
    batch: int = 8,
    seed: int = 0,
) -> Iterator[list[int]]:
    """`samples` texts of at most `tokens` new token ids each, prompt included, taking turns with `prompts`.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, at least one each (for example the beginning-of-text token).
        pad_id: what its tokenizer pads with; cut off again.
        seed: the same seed, model and batch give the same texts.
    """
    torch.manual_seed(seed)
    model.eval()
    for first in range(0, samples, batch):
        chosen = [prompts[at % len(prompts)] for at in range(first, min(first + batch, samples))]
        # Generation goes on at the right, so padding goes to the left.
        reversed_rows = padded([row[::-1] for row in chosen], pad_id)
        inputs = {name: value.flip(1) for name, value in reversed_rows.items()}
        written = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=True, temperature=temperature, pad_token_id=pad_id
        )
        for prompt, mask, row in zip(chosen, inputs["attention_mask"], written.tolist(), strict=True):
            text = row[len(mask) - len(prompt) :]
            yield text[: _end(text, len(prompt), pad_id)]


def write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    """JSON lines, whole or not at all; returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    count = 0
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for count, row in enumerate(rows, 1):  # noqa: B007
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return count


def _end(text: list[int], prompt: int, pad_id: int) -> int:
    """Where the padding after an early end begins; an end-of-text token that is also the padding stays once."""
    end = len(text)
    while end > prompt and text[end - 1] == pad_id:
        end -= 1
    return min(end + 1, len(text))
