"""Scenarios: float formats on every stage: losses, what is exported, and global scales."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist

import ds_compress
from ds_compress.hf.merge import merge_and_unload
from tests.models import tiny_llama
from tests.multirank.common import ds_config, engine_of, full_weights, train

STAGES = (0, 1, 2, 3)
SCHEMES = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W4AFP8", "NVFP4", "MXFP4", "MXFP4XFP8", "MXFP6A8", "MXFP8")


def nvfp4(scales: str, **shared: Any) -> dict[str, Any]:
    return {"scheme": "NVFP4A16", "weight_quantization": {"shared_parameters": {"scales": scales, **shared}}}


BLOCKS: dict[str, dict[str, Any]] = {
    **{scheme: {"scheme": scheme} for scheme in SCHEMES},
    "mixed": {"scheme": {"FP8_DYNAMIC": ["self_attn"], "NVFP4": ["mlp"]}},
    "fp8 product": {
        "scheme": "FP8_DYNAMIC",
        "weight_quantization": {"shared_parameters": {"kernel": "fp8"}},
    },
    "kv cache": {"scheme": "FP8_DYNAMIC", "kv_cache": "fp8"},
    "static": nvfp4("static"),
    "searched": nvfp4("searched"),
    "learned": nvfp4("learned"),
    "learned mx": {
        "scheme": "MXFP4A16",
        "weight_quantization": {"shared_parameters": {"scales": "learned"}},
    },
    "scales only": nvfp4("learned", train="scales"),
    "schedule": {
        "weight_quantization": {
            "shared_parameters": {"enabled": True, "schedule_offset": 1},
            "different_groups": {
                "all": {
                    "params": {
                        "format": "nvfp4",
                        "earlier_formats": [
                            {"format": "int", "bits": 8, "steps": 1},
                            {"format": "fp8_e4m3", "steps": 1},
                        ],
                    },
                    "modules": ["layers"],
                }
            },
        },
        "activation_quantization": {
            "shared_parameters": {"enabled": True, "schedule_offset": 1},
            "different_groups": {
                "all": {
                    "params": {"format": "nvfp4", "earlier_formats": [{"format": "fp8_e4m3", "steps": 2}]},
                    "modules": ["layers"],
                }
            },
        },
    },
    "pruned": {
        "scheme": "NVFP4",
        "sparse_pruning": {
            "shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 1},
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": ["layers"]}},
        },
    },
}


def small_llama(seed: int = 0) -> torch.nn.Module:
    return tiny_llama(seed, hidden=128, intermediate=256, heads=2, key_value_heads=1)


def texts(steps: int, rank: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7 + rank)
    return [
        {"input_ids": (ids := torch.randint(0, 128, (2, 8), generator=generator)), "labels": ids}
        for _ in range(steps)
    ]


def trained(
    steps: int = 5,
    names: tuple[str, ...] = tuple(BLOCKS),
    stages: tuple[int, ...] = STAGES,
    same_data: bool = False,
) -> dict[Any, Any]:
    """Losses, exported weights and global scales by (block, stage); "plain": DeepSpeed alone.

    same_data: all processes get the same, so that gradients average without rounding; nothing is clipped, because
    DeepSpeed adds the norm up in another order on other numbers of processes.
    """
    unclipped = {"gradient_clipping": 0.0} if same_data else {}
    results: dict[Any, Any] = {}
    for name in ("plain", *names):
        for stage in stages:
            model = small_llama()
            with engine_of(model, ds_config(stage, copy.deepcopy(BLOCKS.get(name)), **unclipped)) as engine:
                losses = train(engine, iter(texts(steps, 0 if same_data else dist.get_rank())))
                found: dict[str, Any] = {"losses": losses}
                if name != "plain":
                    found["exported"] = ds_compress.export_state_dict(engine)
                    found["final"] = full_weights(model)
                    found["global"] = {
                        module_name: float(fake_quant.global_scale)
                        for module_name, module in model.named_modules()
                        if (fake_quant := ds_compress.quant.layers.fake_quant_of(module)) is not None
                        and fake_quant.global_scale is not None
                    }
                results[name, stage] = found
    return results


def adapted() -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], lora_dropout=0.0)
    return get_peft_model(small_llama(), config)


def lora(folder: str, steps: int = 4) -> dict[Any, Any]:
    """Adapters on a base in NVFP4, rounded at each forward or held as codes; resumed, and merged."""
    results: dict[Any, Any] = {}
    for stage in (0, 2, 3):
        for held in ("full", "packed"):
            shared = {"shared_parameters": {"frozen_weights": held}}
            block = {"scheme": "NVFP4A16", "weight_quantization": shared}
            data = texts(steps, dist.get_rank())
            model = adapted()
            model.gradient_checkpointing_enable()
            parameters = list(model.parameters())  # frozen ones, too, as many scripts do
            with engine_of(model, ds_config(stage, block), model_parameters=parameters) as engine:
                losses = train(engine, iter(data[:2]))
                engine.save_checkpoint(f"{folder}/{held}-{stage}")
                losses += train(engine, iter(data[2:]))
                resident = sum(
                    tensor.nbytes
                    for name, tensor in (*model.named_parameters(), *model.named_buffers())
                    if "base_layer" in name or "_proj.weight" in name
                )
                merged = merge_and_unload(engine)
                result = {"losses": losses, "resident": resident, "merged": full_weights(merged)}
            model = adapted()
            with engine_of(model, ds_config(stage, block)) as engine:
                engine.load_checkpoint(f"{folder}/{held}-{stage}")
                result["resumed"] = train(engine, iter(data[2:]))
            results[held, stage] = result
    return results
