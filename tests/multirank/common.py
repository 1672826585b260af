"""Tiny models, configs and batches that the multi-process scenarios share."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from tests.models import VOCABULARY

VOCAB = VOCABULARY


def device() -> torch.device:
    """Where this process trains: see `launch`."""
    return torch.device(get_accelerator().current_device_name())


def ds_config(
    stage: int,
    block: dict[str, Any] | None = None,
    dtype: str = "fp32",
    zero: dict[str, Any] | None = None,
    **extra: Any,
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_force_ds_cpu_optimizer": False,
        **extra,
    }
    if stage == 3:
        config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 0)
    if dtype != "fp32":
        config[dtype] = {"enabled": True}
    if block is not None:
        config["compression_training"] = block
    return config


@dataclass(frozen=True)
class Wrapper:
    """One of DeepSpeed's optimizer wrappers. zero, extra: keys of the JSON. groups: two parameter groups."""

    stage: int
    dtype: str = "fp32"
    zero: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    groups: bool = False

    def config(self, block: dict[str, Any], **extra: Any) -> dict[str, Any]:
        return ds_config(self.stage, block, self.dtype, self.zero, **self.extra, **extra)

    def parameters(self, model: torch.nn.Module) -> Any:
        """What `deepspeed.initialize` gets as model_parameters."""
        if not self.groups:
            return model.parameters()
        return [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]


def batches(
    steps: int, seed: int = 1, rank: int = 0, size: int = 4, tokens: int = 12
) -> Iterator[dict[str, torch.Tensor]]:
    """The same batches in every process unless `rank` differs: then gradients average without rounding,
    and training is bitwise equal at world sizes 1, 2 and 4."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(steps):
        ids = torch.randint(0, VOCAB, (size, tokens), generator=generator).to(device())
        yield {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": (ids[:, 0] > VOCAB // 2).long(),
        }


@contextmanager
def engine_of(model: torch.nn.Module, config: dict[str, Any], **kwargs: Any) -> Iterator[Any]:
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=kwargs.pop("model_parameters", model.parameters()),
        config=config,
        **kwargs,
    )
    try:
        yield engine
    finally:
        engine.destroy()
        del engine
        gc.collect()
        # What an engine leaks, and these are small, is not looked at again for every later one: see `tests.frozen`.
        gc.freeze()


def train(engine: Any, data: Iterator[dict[str, torch.Tensor]]) -> list[float]:
    losses = []
    for batch in data:
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter whole, on every rank, in CPU memory."""
    result = {}
    for name, parameter in model.named_parameters():
        partitioned = [parameter] if hasattr(parameter, "ds_id") else []
        with deepspeed.zero.GatheredParameters(partitioned):
            result[name] = parameter.detach().float().cpu().clone()
    return result


def pruning_block(method: str = "l1", density: float = 0.3, **shared: Any) -> dict[str, Any]:
    return {
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": method, "pattern": "unstructured", **shared},
            "different_groups": {
                "attention": {"params": {"dense_ratio": density}, "modules": ["attention.self"]},
                "ffn": {"params": {"dense_ratio": density}, "modules": ["intermediate", r"layer.\d+.output"]},
            },
        }
    }


def structured_block(**shared: Any) -> dict[str, Any]:
    """The value of any structured block: half of all units, from step 1 on."""
    return {"shared_parameters": {"enabled": True, "schedule_offset": 1, "dense_ratio": 0.5, **shared}}


def weight_quantization(bits: int, modules: str, **shared: Any) -> dict[str, Any]:
    """`modules` fake-quantized in forward, a scale for each output channel."""
    keys = {"enabled": True, "quantize_weight_in_forward": True, "granularity": "per_channel", **shared}
    params = {"start_bits": bits, "target_bits": bits}
    groups = {"all": {"params": params, "modules": [modules]}}
    return {"weight_quantization": {"shared_parameters": keys, "different_groups": groups}}
