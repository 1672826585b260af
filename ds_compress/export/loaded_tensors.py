"""The tensors of a loaded model: fingerprints of its floats, and scales of its static inputs."""

from __future__ import annotations

import torch
from torch import nn

from ds_compress.export.fingerprint import Fingerprint, fingerprint
from ds_compress.export.read import InputScheme
from ds_compress.export.serve import Int8Embedding, Int8Linear
from ds_compress.quant.fake_quant import global_input_scale
from ds_compress.quant.qparams import qparams_from_range


def fingerprints_of(model: nn.Module) -> dict[str, Fingerprint]:
    """Of all floats that the model holds, by every name that they have."""
    held: list[tuple[str, torch.Tensor]] = []
    held += [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held += [
        (f"{name}.weight", m.weight) for name, m in model.named_modules() if isinstance(m, Int8Embedding)
    ]
    return {name: fingerprint(value) for name, value in held if value.is_floating_point()}


def input_scales(model: nn.Module) -> dict[str, torch.Tensor]:
    """{"<module>.input_scale": fp32 (1,)} of the layers whose inputs have a static range."""
    found = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        scale = None
        if isinstance(module, Int8Linear):
            scale = module.input_scale
        elif quantizer is not None and quantizer.input_range is not None:
            scale = input_scale(InputScheme(quantizer.grid, quantizer.input_range))
        if scale is not None:
            found[f"{name}.input_scale"] = scale
    return found


def input_scale(used: InputScheme) -> torch.Tensor | None:
    """fp32 (1,) of a static range; where scales have one more, that of the whole tensor."""
    if used.input_range is None:
        return None
    if used.grid.has_global_scale:
        return global_input_scale(used.input_range, used.grid, used.input_range)
    return qparams_from_range(used.input_range[0], used.input_range[1], used.grid).scale.reshape(1)
