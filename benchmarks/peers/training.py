"""One step of quantization-aware training of the same BERT on one thread, fp32 master weights: who runs it.

Everybody starts from the same fp32 weights, takes the same batch with torch's fused AdamW, and quantizes the 36 linear
layers of the encoder and nothing else. The numbers are each one's own: what is symmetric, and whether scales are made
in each step or once beforehand, is in the file of each.
"""

from __future__ import annotations

from benchmarks.peers import encoder

SHAPE = "a step of 32 x 40"
PEERS = {
    "training_ours": "ours",
    "training_ours_compiled": "ours",
    "training_torch": "ours",
    "training_modelopt": "modelopt",
    "training_modelopt_compiled": "modelopt",
    "training_torchao": "torchao",
    "training_torchao_compiled": "torchao",
}
"""Module and environment."""
UNQUANTIZED = ("torch fp32", "torch fp32, compiled", "DeepSpeed fp32", "DeepSpeed fp32, compiled")
LAYERS = "encoder.layer"
"""In the names of the layers that are quantized."""
GROUPS = (32, 128)
"""Columns that share a scale of 4-bit weights."""
LEARNING_RATE = 1e-5
prepare = encoder.prepare
