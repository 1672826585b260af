"""Scenarios: fused experts are quantized alike at every ZeRO stage, and exported as computed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

import ds_compress
from tests.multirank.common import ds_config, engine_of, full_weights
from tests.zoo.mixtures import ARCHITECTURES, mixture, tokens

STAGES = (0, 2, 3)


def _int4(**shared: Any) -> dict[str, Any]:
    params = {"target_bits": 4, "granularity": "per_column_group", "group_size": 8}
    return {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, **shared},
            "different_groups": {"g": {"params": params, "modules": ["experts"]}},
        }
    }


BLOCKS: dict[str, dict[str, Any]] = {
    "int4": _int4(),
    "learned": _int4(scales="learned"),
    "static inputs": {
        **_int4(),
        "activation_quantization": {
            "shared_parameters": {"enabled": True, "range_calibration": "static", "narrow_range": True},
            "different_groups": {"g": {"params": {"bits": 8}, "modules": ["experts"]}},
        },
    },
    "fp8": {"scheme": "FP8_DYNAMIC"},
    "nvfp4": {"scheme": {"NVFP4": ["experts.*(gate_up_proj|down_proj)"]}},
    "learned nvfp4": {
        "scheme": {"NVFP4A16": ["experts.*(gate_up_proj|down_proj)"]},
        "weight_quantization": {"shared_parameters": {"scales": "learned"}},
    },
    "pruned": {
        **_int4(),
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 1},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": ["experts"]}},
        },
    },
}


def built(name: str, seed: int = 0, experts: int | None = None) -> Any:
    """Every expert has 16 inputs or 32."""
    known = {"intermediate_size", *ARCHITECTURES[name][2]}
    widths = {"intermediate_size": 32, "moe_intermediate_size": 32, "intermediate_size_mlp": 32}
    config = {key: width for key, width in widths.items() if key in known}
    if experts is not None:
        config["num_experts"] = experts
    return mixture(name, seed, **config).train()


def step(engine: Any, seed: int) -> float:
    """Few tokens, so that experts go without."""
    ids = tokens(1, 6, seed=seed)
    loss = engine(input_ids=ids).logits.float().square().mean()
    engine.backward(loss)
    engine.step()
    return float(loss)


def trained(
    names: Sequence[str] = ("qwen3_moe", "gpt_oss", "llama4"),
    blocks: Sequence[str] = tuple(BLOCKS),
    stages: Sequence[int] = STAGES,
    dtype: str = "fp32",
    steps: int = 4,
    alike: bool = True,
    experts: int | None = None,
) -> dict[Any, Any]:
    """{(architecture, block, stage): losses, final weights, exported ones, input ranges}; "plain": DeepSpeed alone.

    alike: all processes see the same tokens. (architecture, "initial"): weights before.
    """
    results: dict[Any, Any] = {}
    for name in names:
        results[name, "initial"] = {
            n: p.detach().clone() for n, p in built(name, experts=experts).named_parameters()
        }
        for key in ("plain", *blocks):
            for stage in stages:
                model = built(name, experts=experts)
                config = ds_config(stage, copy.deepcopy(BLOCKS.get(key)), dtype, gradient_clipping=0.0)
                with engine_of(model, config) as engine:
                    offset = 0 if alike else 100 * dist.get_rank()
                    losses = [step(engine, offset + number) for number in range(steps)]
                    found: dict[str, Any] = {"losses": losses, "final": full_weights(model)}
                    if key != "plain":
                        found["exported"] = ds_compress.export_state_dict(engine)
                        found["ranges"] = ranges_of(engine)
                    results[name, key, stage] = found
    return results


def ranges_of(engine: Any) -> dict[str, torch.Tensor]:
    technique = engine.compression.techniques.get("activation_quantization")
    return {} if technique is None else dict(technique.state_dict()["ranges"])


def shrunk(keys: Sequence[str] = ("int4", "learned", "static inputs", "nvfp4")) -> dict[Any, Any]:
    """{(block, stage, whether experts leave in mid-training): losses, experts and ranges in the end}."""
    results: dict[Any, Any] = {}
    for name in ("qwen3_moe", "gpt_oss"):
        for key in keys:
            for stage in STAGES:
                for shrinks in (True, False):
                    pruning = {"enabled": True, "method": "l2", "dense_ratio": 0.5, "schedule_offset": 2}
                    block = copy.deepcopy(BLOCKS[key])
                    pruning["shrink_at_end_of_schedule"] = shrinks
                    block["expert_pruning"] = {"shared_parameters": pruning}
                    model = built(name)
                    with engine_of(model, ds_config(stage, block, gradient_clipping=0.0)) as engine:
                        losses = [step(engine, number) for number in range(6)]
                        ranges = ranges_of(engine)
                        final = ds_compress.finalize(engine)
                        shapes = {n: tuple(p.shape) for n, p in final.named_parameters()}
                        results[name, key, stage, shrinks] = {
                            "losses": losses,
                            "shapes": shapes,
                            "ranges": ranges,
                        }
    return results


def variants(steps: int = 3) -> dict[Any, list[float]]:
    """{(block, stage, implementation, checkpointing): losses}; checkpointing: "none", "reentrant" or "hooks"."""
    results: dict[Any, list[float]] = {}
    block = {
        "int4": _int4(quantize_weight_in_forward=True, narrow_range=False),
        "static": BLOCKS["static inputs"],
    }
    for key, chosen in block.items():
        for stage in (0, 3):
            for implementation in ("eager", "batched_mm", "grouped_mm"):
                for checkpointing in ("none", "reentrant", "hooks"):
                    model = built("qwen3_moe")
                    model.config._experts_implementation = implementation
                    if checkpointing != "none":
                        given = {"use_reentrant": checkpointing == "reentrant"}
                        model.gradient_checkpointing_enable(given)
                        model.enable_input_require_grads()
                    config = ds_config(stage, copy.deepcopy(chosen), gradient_clipping=0.0)
                    with engine_of(model, config) as engine:
                        losses = [step(engine, number) for number in range(steps)]
                    results[key, stage, implementation, checkpointing] = losses
    return results
