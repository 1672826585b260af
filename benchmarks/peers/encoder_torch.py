"""Stock transformers in fp32, and in bf16 where the CPU has instructions for it."""

from __future__ import annotations

import torch

from benchmarks.peers import worker
from benchmarks.peers.encoder_inputs import FOLDER, batches, stock_model


def main() -> None:
    models = {"torch fp32": stock_model()}
    if torch.cpu._is_avx512_bf16_supported():  # seconds a batch elsewhere
        models["torch bf16"] = stock_model().bfloat16()
    size = worker.bytes_of(FOLDER, "model*.safetensors")
    facts = {"torch fp32": {"bytes": size}, "torch bf16": {"bytes": size / 2}}
    runs = {
        f"{name}, {shape}": lambda model=model, batch=batch: model(**batch)
        for name, model in models.items()
        for shape, (batch,) in batches().items()
    }
    with torch.inference_mode():
        worker.serve(runs, ["torch", "transformers"], facts)
