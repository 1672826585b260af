"""Scenarios: structured pruning, finalize and mid-training shrink must not depend on ZeRO stage or world size."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import ds_compress
from tests.models import tiny_bert
from tests.multirank.common import Wrapper, batches, ds_config, engine_of, train

STAGES = (0, 1, 2, 3)


def shared(**keys: Any) -> dict[str, Any]:
    return {"shared_parameters": {"enabled": True, "schedule_offset": 2, **keys}}


SCHEDULE = {"schedule_offset_end": 6, "schedule_offset_stride": 2}
BLOCKS: dict[str, dict[str, Any]] = {
    "rows-l1": {"row_pruning": shared(dense_ratio=0.5, **SCHEDULE)},
    "rows-topk": {"row_pruning": shared(dense_ratio=0.5, method="topk", **SCHEDULE)},
    "rows-activation-global": {
        "row_pruning": shared(dense_ratio=0.5, method="activation", scope="global", round_to=4, **SCHEDULE)
    },
    # One process of two owns nothing of this layer under ZeRO.
    "one-layer-taylor": {
        "row_pruning": {
            "shared_parameters": {"enabled": True, "method": "taylor", "schedule_offset": 2},
            "different_groups": {
                "g": {"params": {"dense_ratio": 0.5}, "modules": [r"layer\.0\.intermediate"]}
            },
        }
    },
    "heads-taylor": {"head_pruning": shared(dense_ratio=0.5, method="taylor", **SCHEDULE)},
    "heads-topk": {"head_pruning": shared(dense_ratio=0.5)},
    "depth-activation": {"depth_pruning": shared(dense_ratio=0.5)},
    "depth-taylor": {"depth_pruning": shared(dense_ratio=0.5, method="taylor")},
    "all-random": {
        "row_pruning": shared(dense_ratio=0.5, method="random"),
        "head_pruning": shared(dense_ratio=0.5, method="random"),
        "depth_pruning": shared(dense_ratio=0.5, method="random"),
    },
}


def model() -> torch.nn.Module:
    return tiny_bert(layers=4)


def logits_of(anything: Any) -> torch.Tensor:
    batch = next(iter(batches(1, seed=9)))
    with torch.no_grad():
        output = anything(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return output.logits.float().clone()


def masked_and_final(names: tuple[str, ...], stages: tuple[int, ...] = STAGES) -> dict[tuple[str, int], Any]:
    """{(block, stage): kept units, losses, logits while masked and after finalize, sizes}."""
    results = {}
    for name in names:
        for stage in stages:
            with engine_of(model(), ds_config(stage, BLOCKS[name])) as engine:
                losses = train(engine, batches(8))
                kept = {name: units.tolist() for name, units in engine.compression.kept_units.items()}
                engine.eval()
                masked = logits_of(engine)
                final = ds_compress.finalize(engine)
                results[name, stage] = {
                    "kept": kept,
                    "losses": losses,
                    "masked": masked,
                    "final": logits_of(final),
                    "parameters": sum(p.numel() for p in final.parameters()),
                    "plain": not any(hasattr(p, "ds_id") for p in final.parameters()),
                    "config": (final.config.num_hidden_layers, final.config.intermediate_size),
                }
    return results


QUANTIZED = {
    "weight_quantization": {
        "shared_parameters": {
            "enabled": True,
            "quantize_weight_in_forward": True,
            "granularity": "per_channel",
            "learned_scale": True,
        },
        "different_groups": {
            "e": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["encoder.layer"]}
        },
    },
    "activation_quantization": {
        "shared_parameters": {"enabled": True, "range_calibration": "static", "schedule_offset": 0},
        "different_groups": {"e": {"params": {"bits": 8}, "modules": ["encoder.layer"]}},
    },
}
SPARSE = {
    "sparse_pruning": {
        "shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 1},
        "different_groups": {"e": {"params": {"dense_ratio": 0.5}, "modules": ["encoder.layer"]}},
    }
}
SHRINKING: dict[str, dict[str, Any]] = {
    "rows+heads+depth": {
        "row_pruning": shared(dense_ratio=0.5),
        "head_pruning": shared(dense_ratio=0.5, method="l1"),
        "depth_pruning": shared(dense_ratio=0.5),
    },
    "rows+sparse+w8a8": {"row_pruning": shared(dense_ratio=0.5), **SPARSE, **QUANTIZED},
}
WRAPPERS: dict[str, Wrapper] = {
    "fp32-0": Wrapper(0),
    "fp32-1": Wrapper(1),
    "fp32-2": Wrapper(2),
    "fp32-3": Wrapper(3),
    "bf16-0": Wrapper(0, "bf16"),
    "bf16-1": Wrapper(1, "bf16", extra={"data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16-2-offload-groups": Wrapper(
        2, "bf16", {"offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True}, groups=True
    ),
    "bf16-3-sub-groups": Wrapper(3, "bf16", {"sub_group_size": 5000}),
}
SCHEDULER = {
    "type": "WarmupLR",
    "params": {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 12, "warmup_type": "linear"},
}


def _config(wrapper: str, block: dict[str, Any], shrinks: bool) -> dict[str, Any]:
    marked = {
        key: {"shared_parameters": {**value["shared_parameters"], "shrink_at_end_of_schedule": True}}
        if shrinks and key in ("row_pruning", "head_pruning", "depth_pruning")
        else value
        for key, value in block.items()
    }
    return WRAPPERS[wrapper].config(marked, scheduler=SCHEDULER)


def shrunk_and_masked(cases: list[tuple[str, str]], steps: int = 8) -> dict[Any, Any]:
    """{(block, wrapper): losses of a run that shrinks and of one that only masks, and what they have in the end}."""
    results: dict[Any, Any] = {}
    for name, wrapper in cases:
        for shrinks in (True, False):
            net = model()
            config = _config(wrapper, SHRINKING[name], shrinks)
            parameters = WRAPPERS[wrapper].parameters(net)
            with engine_of(net, config, model_parameters=parameters) as engine:
                optimizer, scheduler = engine.optimizer, engine.lr_scheduler
                losses = train(engine, batches(steps))
                results[name, wrapper, shrinks] = {
                    "losses": losses,
                    "applied": engine.compression.applied_steps,
                    "steps": engine.global_steps,
                    "lr": engine.get_lr()[0],
                    "same_state": vars(optimizer) is vars(engine.optimizer)
                    and vars(scheduler) is vars(engine.lr_scheduler),
                    "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in net.parameters()),
                    "metrics": engine.compression.metrics(),
                }
    return results


def resumed_after_shrink(wrapper: str, folder: str | None = None) -> dict[str, Any]:
    """Losses of an unbroken run, and of one that was saved after shrinking and resumed from the full model."""
    name = "rows+sparse+w8a8"
    config = _config(wrapper, SHRINKING[name], True)
    data = list(batches(8))
    paths: list[Any] = [folder or tempfile.mkdtemp()]
    dist.broadcast_object_list(paths)
    with engine_of(model(), config) as engine:
        train(engine, iter(data[:5]))
        engine.save_checkpoint(paths[0])
        unbroken = train(engine, iter(data[5:]))
    with engine_of(model(), config) as engine:
        engine.load_checkpoint(paths[0])
        resumed = train(engine, iter(data[5:]))
    assert Path(paths[0]).exists()
    return {"unbroken": unbroken, "resumed": resumed}
