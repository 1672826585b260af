"""Torch without quantization and torchao, compiled by Inductor. A peer of its own, for that needs a C++ compiler."""

from __future__ import annotations

import torch

from benchmarks.peers import worker
from benchmarks.peers.training_inputs import allow_recompilation, checked, model, torch_step
from benchmarks.peers.training_torchao import configs, quantized


def main() -> None:
    allow_recompilation()
    models = {"torch fp32": model()} | {name: quantized(name, config) for name, config in configs().items()}
    runs = [checked(f"{name}, compiled", torch_step(torch.compile(each))) for name, each in models.items()]
    worker.serve(dict(runs), ["torchao", "torch", "transformers"])
