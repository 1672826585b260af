"""The batches, from a folder that needs no package of ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.encoder import SHAPES

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def batches(count: int = 1) -> dict[str, list[dict[str, torch.Tensor]]]:
    """{shape: `count` batches of input_ids and attention_mask}, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name, shape in SHAPES.items():
        ids = [torch.randint(1000, 30_000, shape, generator=generator) for _ in range(count)]
        found[name] = [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]
    return found


def stock_model() -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(1)
    return AutoModelForSequenceClassification.from_pretrained(FOLDER, attn_implementation="sdpa").eval()
