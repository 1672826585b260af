"""What `training_modelopt` runs, compiled by Inductor: in pieces, for each quantizer branches on its data."""

from __future__ import annotations

import torch

from benchmarks.peers import worker
from benchmarks.peers.training_inputs import allow_recompilation, checked, torch_step
from benchmarks.peers.training_modelopt import quantized


def main() -> None:
    allow_recompilation()
    models = quantized()
    runs = [checked(f"{name}, compiled", torch_step(torch.compile(each))) for name, each in models.items()]
    worker.serve(dict(runs), ["nvidia-modelopt", "torch", "transformers"])
