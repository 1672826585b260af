"""Stock transformers without quantization: fp32, and bf16 autocast where the CPU has instructions for it."""

from __future__ import annotations

import torch

from benchmarks.peers import worker
from benchmarks.peers.training_inputs import checked, model, torch_step


def main() -> None:
    runs = [checked("torch fp32", torch_step(model()))]
    if torch.cpu._is_avx512_bf16_supported():  # many seconds a step elsewhere
        runs.append(checked("torch bf16 autocast", torch_step(model(), autocast=True)))
    worker.serve(dict(runs), ["torch", "transformers"])
