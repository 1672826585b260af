"""Observed scales of a quantized KV cache, which an export stores beside the attention modules.

A key or value is stored as E4M3(x / scale); one scale for all heads of a module.
"""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.export.source import ExportSource

Scales = dict[str, tuple[torch.Tensor, torch.Tensor]]


def kv_cache_scales(source: ExportSource) -> Scales:
    """fp32 (1,) of keys and of values, by the name of the attention module; empty: the cache is not quantized."""
    return {}


def stored(scales: Scales) -> dict[str, torch.Tensor]:
    """By full name, as compressed-tensors and vLLM call them."""
    found = {f"{module}.k_scale": keys for module, (keys, _) in scales.items()}
    found |= {f"{module}.v_scale": values for module, (_, values) in scales.items()}
    # Copies, as no two tensors of a file may share memory.
    return {
        name: scale.detach().to("cpu", torch.float32, copy=True).reshape(1) for name, scale in found.items()
    }


def scheme() -> dict[str, Any]:
    """`kv_cache_scheme` of compressed-tensors: E4M3, static, one scale each."""
    from compressed_tensors.quantization import QuantizationArgs

    given = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    dumped: dict[str, Any] = QuantizationArgs(**given).model_dump(mode="json")
    return dumped
