"""Models with the quantizers of a finished training, without the training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ds_compress import plan
from ds_compress.quant import layers
from ds_compress.techniques import TECHNIQUES


def quantized(
    model: nn.Module,
    bits: int = 8,
    inputs: dict[str, Any] | None = None,
    modules: tuple[str, ...] = ("*",),
    run: dict[str, torch.Tensor] | None = None,
    **shared: Any,
) -> nn.Module:
    """Weights of `bits`, inputs as the dict says (None: not at all); `run` gives static inputs their ranges."""
    block: dict[str, Any] = {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "granularity": "per_channel", "schedule_offset": 0}
            | {"quantize_weight_in_forward": True, **shared},
            "different_groups": {
                "g": {"params": {"start_bits": bits, "target_bits": bits}, "modules": list(modules)}
            },
        }
    }
    if inputs is not None:
        block["activation_quantization"] = {
            "shared_parameters": {"enabled": True, "schedule_offset": 0, **inputs},
            "different_groups": {"g": {"params": {"bits": 8}, "modules": list(modules)}},
        }
    for name, technique in plan(model, block).techniques.items():
        TECHNIQUES[name](technique, 0).prepare(model)
    if run is not None:
        model.train()(**run)
        model.eval()
        for module in model.modules():
            quantizer: layers.InputQuantizer | None = getattr(module, "input_quantizer", None)
            if quantizer is not None and quantizer.observed is not None:
                quantizer.input_range = quantizer.observed * torch.tensor([-1.0, 1.0])
    return model
