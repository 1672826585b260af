"""torchao: QAT with the fake quantization that it infers from two base configs, and its int8 mixed-precision training.

QAT rounds inputs per token with dynamic asymmetric ranges (it has no symmetric ones) and weights symmetrically, with
scales of each step. Mixed precision multiplies symmetric int8 in forward and leaves backward in fp32: its gradients are
those of weights and inputs that were not rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerAxis, PerGroup
from torchao.quantization.qat import QATConfig

from benchmarks.peers import worker
from benchmarks.peers.training import GROUPS
from benchmarks.peers.training_inputs import checked, is_quantized, model, require_quantized, torch_step


def configs() -> dict[str, QATConfig | Int8MixedPrecisionTrainingConfig]:
    """{the name of a run: what `quantize_` gets}"""
    int8 = Int8DynamicActivationIntxWeightConfig(torch.int8, PerAxis(0))
    found: dict[str, QATConfig | Int8MixedPrecisionTrainingConfig] = {
        "torchao QAT W8A8 dynamic": QATConfig(int8, step="prepare"),
        "torchao int8 mixed precision, forward": Int8MixedPrecisionTrainingConfig(
            grad_input=False, grad_weight=False, module_swap=True
        ),
    }
    for size in GROUPS:
        int4 = IntxWeightOnlyConfig(torch.int4, PerGroup(size))  # type: ignore[attr-defined]
        found[f"torchao QAT W4 groups of {size}"] = QATConfig(int4, step="prepare")
    return found


def quantized(name: str, config: QATConfig | Int8MixedPrecisionTrainingConfig) -> Any:
    trained = model()
    quantize_(trained, config, is_quantized)
    require_quantized(name, trained)
    return trained


def main() -> None:
    runs = [checked(name, torch_step(quantized(name, config))) for name, config in configs().items()]
    worker.serve(dict(runs), ["torchao", "torch", "transformers"])
