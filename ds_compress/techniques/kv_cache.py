"""`kv_cache`: keys and values are rounded as the FP8 cache of a server will hold them.

A cache stores E4M3(k / k_scale) and E4M3(v / v_scale), keys after rotation, with one static scale each per layer. Here
both are fake-quantized right before the attention kernel (see `modelinfo.attention_kernels`), with ranges that are a
running mean of what training sees, the same in every process; an export stores the scales beside the attention modules.
Gradients are straight through, zero where a value saturates. Until a layer has a first range, its keys and values pass
as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ds_compress.config.schema.kv_cache import FORMATS_OF_A_CACHE, KvCacheConfig
from ds_compress.modelinfo.attention_kernels import (
    Handle,
    KernelInputs,
    KeyValue,
    add_hook,
    can_open,
    close_kernels,
    open_kernels,
)
from ds_compress.modelinfo.decoder_attention import decoder_attentions
from ds_compress.quant.fake_quantized_tensor import fake_quantized_tensor
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from ds_compress.quant.quantizers import InputQuantizer
from ds_compress.techniques.base import Technique, TechniqueContext
from ds_compress.techniques.observed_ranges import ObservedRanges, renamed_ranges

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ds_compress.sharding.shards import Shards

KEYS, VALUES = "key_quantizer", "value_quantizer"
"""Attributes of an attention module, `InputQuantizer`s."""


class KvCacheQuantization(Technique):
    """Raises ValueError at construction for a model without a cache that could be quantized."""

    name = KvCacheConfig.key
    is_in_forward = True

    @classmethod
    def of(cls, context: TechniqueContext) -> KvCacheQuantization | None:
        block = context.config.kv_cache
        return cls(block, context.model) if block is not None and block.enabled else None

    def __init__(self, block: KvCacheConfig, model: nn.Module) -> None:
        self._block = block
        self._model = model
        self._modules = decoder_attentions(model)
        if not self._modules or not can_open(model):
            raise ValueError(
                f"a {type(model).__name__} has no causal attention of transformers' kernels, so no cache of keys and "
                'values that could be quantized: remove "kv_cache"'
            )
        grid = ActivationGrid(
            bits=8,
            format=FORMATS_OF_A_CACHE[block.format],
            granularity=TokenGranularity.PER_TENSOR,
            static=True,
        )
        self._quantizers = {
            f"{name}.{kind}": InputQuantizer(grid) for name in self._modules for kind in (KEYS, VALUES)
        }
        self._ranges = ObservedRanges(self._quantizers, block.range_momentum)
        self._handles: list[Handle] = []
        self._step = 0

    def prepare(
        self, model: nn.Module, full_parameters: Callable[..., Any] = contextlib.nullcontext
    ) -> Mapping[str, nn.Parameter]:
        open_kernels(model)
        for name, module in self._modules.items():
            for kind in (KEYS, VALUES):
                vars(module)[kind] = self._quantizers[f"{name}.{kind}"]
            self._handles.append(add_hook(module, _quantized))
        self._use_schedule_at(0)
        return {}

    def attach(self, shards: Shards) -> None:
        self._ranges.attach(shards)

    def before_step(self, step: int) -> None:
        self._ranges.remember()
        if self._step >= self._block.schedule_offset:
            self._ranges.update(self._device())

    def on_skipped_step(self) -> None:
        self._ranges.put_back()

    def after_step(self, step: int) -> None:
        self._use_schedule_at(step)

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for module in self._modules.values():
            for kind in (KEYS, VALUES):
                vars(module).pop(kind, None)
        close_kernels(self._model)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "ranges": self._ranges.state()}

    def renamed_state(self, renamed: Callable[[str], str | None]) -> dict[str, Any]:
        state = self.state_dict()
        return {**state, "ranges": renamed_ranges(state["ranges"], renamed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ranges.load(state["ranges"])
        self._use_schedule_at(int(state["step"]))

    def metrics(self) -> dict[str, float]:
        """`layers_with_range`: of all attention modules, those whose keys and values are quantized."""
        known = len(self._quantizers) - self._ranges.missing
        return {"layers_with_range": known / 2}

    def _use_schedule_at(self, step: int) -> None:
        self._step = step
        for quantizer in self._quantizers.values():
            quantizer.enabled = step >= self._block.schedule_offset

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


def _quantized(given: KernelInputs) -> KeyValue | None:
    quantizers = vars(given.module).get(KEYS), vars(given.module).get(VALUES)
    found = []
    for quantizer, tensor in zip(quantizers, (given.key, given.value), strict=True):
        if quantizer is None:  # switched off for a teacher's forward
            return None
        grid, fixed_range = quantizer.active(tensor, given.module.training)
        found.append(tensor if grid is None else fake_quantized_tensor(tensor, grid, fixed_range))
    return KeyValue(*found)
