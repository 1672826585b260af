"""Observed scales of a quantized KV cache, which an export stores beside the attention modules.

A key or value is stored as E4M3(x / scale); one scale for all heads of a module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.source import ExportSource
from ds_compress.quant.qparams import qparams_from_range
from ds_compress.techniques.kv_cache import KEYS, VALUES

Scales = dict[str, tuple[torch.Tensor, torch.Tensor]]


def kv_cache_scales(source: ExportSource) -> Scales:
    """fp32 (1,) of keys and of values, by the name of the attention module; empty: the cache is not quantized.

    Raises:
        ExportError: it is to be, and nothing was observed yet.
    """
    found = {}
    for name, module in source.model.named_modules():
        quantizers = [vars(module).get(kind) for kind in (KEYS, VALUES)]
        if not all(quantizer is not None and quantizer.enabled for quantizer in quantizers):
            continue
        plan = source.pruning_plan
        kept = f"{name}.x" if plan is None else plan.renamed(f"{name}.x")
        if kept is None:
            continue
        keys, values = (_scale(name, quantizer) for quantizer in quantizers)
        found[kept.rpartition(".")[0]] = keys, values
    return found


def _scale(module: str, quantizer: Any) -> torch.Tensor:
    if quantizer.input_range is None:
        raise ExportError(
            f"{module}: its keys and values are to be quantized and were never observed: train a step first"
        )
    lowest, highest = quantizer.input_range.detach().float().cpu().unbind()
    return qparams_from_range(lowest, highest, quantizer.grid).scale


@contextlib.contextmanager
def full_precision_cache(model: nn.Module) -> Iterator[None]:
    """Inside, keys and values are not quantized: what loads an export here cannot do that, see `stored`."""
    switched = [
        (vars(module), kind) for module in model.modules() for kind in (KEYS, VALUES) if kind in vars(module)
    ]
    before = [attributes[kind] for attributes, kind in switched]
    for attributes, kind in switched:
        attributes[kind] = None
    try:
        yield
    finally:
        for (attributes, kind), quantizer in zip(switched, before, strict=True):
            attributes[kind] = quantizer


def stored(scales: Scales) -> dict[str, torch.Tensor]:
    """By full name, as compressed-tensors and vLLM call them.

    transformers 5.24 calls the argument with the cache `cache`, which compressed-tensors 0.20 does not know: it leaves
    these tensors unread, and the cache in the dtype of the model.
    """
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
