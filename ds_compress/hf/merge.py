"""Merging LoRA adapters into a sparse model adds a dense update: a weight that was half zeros has none left.

`merge_and_unload` clears the pruned elements again, so the merged model is exactly as sparse as the trained one. The
forward of training added the whole update BA beside the sparse weight, so what is cleared here changes the model a
little: compare before you ship. Quantizers stay attached, and an export rounds the merged weight to their grid.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from ds_compress.engine.admission import require_full_layers
from ds_compress.engine.finalize import finalize
from ds_compress.engine.resize.cut import cut_in_place
from ds_compress.modelinfo.adapters import adapted_layers
from ds_compress.ops import bitmask
from ds_compress.quant.packed_weight import unpack_all
from ds_compress.structure.pruning_plan import PruningPlan

logger = logging.getLogger("ds_compress")


@torch.no_grad()
def merge_and_unload(model_or_engine: Any, **kwargs: Any) -> nn.Module:
    """PEFT's `merge_and_unload`, after which every weight that was pruned is still zero.

    Args:
        model_or_engine: a PEFT model; or the DeepSpeed engine that trained one, on any ZeRO stage (a collective; its
            training is over afterwards, and the model is whole in every process).
        **kwargs: those of PEFT's `merge_and_unload`, such as `adapter_names`.

    Returns:
        The base model without adapters. Of each adapted layer, elements of the weight that were exactly zero before are
        zero; other layers are as they were.

    Raises:
        ValueError: the model has no adapters to merge, or tensor parallelism has sharded its layers.
    """
    model = model_or_engine
    if isinstance(getattr(model_or_engine, "module", None), nn.Module):
        model = model_or_engine.module
        require_full_layers(model_or_engine, "merge_and_unload")
        if hasattr(model_or_engine, "compression"):
            finalize(model_or_engine)
        else:
            cut_in_place(model_or_engine, PruningPlan.of([], {}))
    unpack_all(model)
    layers = [layer for _, layer in adapted_layers(model)]
    if not layers or not hasattr(model, "merge_and_unload"):
        raise ValueError(f"merge_and_unload: this {type(model).__name__} has no adapters of PEFT to merge")
    masks: dict[int, tuple[nn.Parameter, torch.Tensor]] = {}
    for layer in layers:
        weight = _base_weight(layer)
        if weight is not None:
            masks[id(weight)] = weight, bitmask.pack(weight.detach().flatten() != 0)
    merged: nn.Module = model.merge_and_unload(**kwargs)
    kept = total = 0
    for weight, mask in masks.values():
        flat = weight.data.contiguous().view(-1)
        bitmask.apply_(flat, mask)
        weight.data = flat.view(weight.shape)
        kept, total = kept + int(flat.count_nonzero()), total + flat.numel()
    sparsity = 1 - kept / max(1, total)
    logger.info("ds_compress: merged %d layers, in which %.1f %% are zero", len(masks), 100 * sparsity)
    return merged


def _base_weight(layer: Any) -> nn.Parameter | None:
    weight = getattr(layer.get_base_layer(), "weight", None)
    return weight if isinstance(weight, nn.Parameter) else None
