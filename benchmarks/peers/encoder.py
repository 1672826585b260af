"""A BERT of MiniLM's size (22.7 M parameters) as a service on one thread: the shapes, and who runs it.

The fp32 model is made once, and each peer gets its folder. Ours is trained for two steps and exported, theirs are
quantized after training: only time and bytes are asked for.
"""

from __future__ import annotations

from pathlib import Path

SHAPES = {"32 x 40": (32, 40), "1 x 40": (1, 40)}
"""Sentences and tokens of a batch."""
PEERS = {
    "encoder_ours": "ours",
    "encoder_torch": "ours",
    "encoder_nncf": "nncf",
    "encoder_onnxruntime": "onnxruntime",
    "encoder_torchao": "torchao",
}
"""Module and environment."""
UNQUANTIZED = ("torch fp32", "torch bf16", "OpenVINO fp32", "onnxruntime fp32")


def prepare(folder: Path) -> None:
    """Writes the fp32 model as stock transformers load it."""
    from benchmarks.engines import MINILM, bert

    bert(MINILM).save_pretrained(folder)
