"""Scenarios: sparse pruning must not depend on ZeRO stage, world size, precision wrapper or offload."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.distributed as dist

import ds_compress  # noqa: F401  (registers)
from tests.models import tiny_bert
from tests.multirank.common import Wrapper, batches, ds_config, engine_of, full_weights, pruning_block, train

STAGES = (0, 1, 2, 3)

# The names are for people; what they mean is in the blocks and in `Wrapper`.
METHODS: dict[str, dict[str, Any]] = {
    "l1": pruning_block("l1"),
    "l1-cubic-global": pruning_block(
        "l1", scope="global", schedule_offset=2, schedule_offset_end=8, schedule_offset_stride=2
    ),
    "l1-regrowth": pruning_block("l1", regrowth=True, scope="group", schedule_offset_end=8),
    "l1-4x3": pruning_block("l1", pattern="4x3", scope="global"),
    "l1-4x16": pruning_block("l1", pattern="4x16", schedule_offset_end=8, schedule_offset_stride=3),
    "movement-4x16": pruning_block("movement", pattern="4x16", scope="group"),
    "l1-2:4": pruning_block("l1", density=0.5, pattern="2:4"),
    "topk": pruning_block("topk"),
    "taylor-global": pruning_block("taylor", scope="global", schedule_offset_end=8, schedule_offset_stride=3),
    "movement": pruning_block("movement", scope="group"),
    "snip_momentum-4x1": pruning_block(
        "snip_momentum", pattern="4x1", schedule_offset_end=8, schedule_offset_stride=2
    ),
    "random": pruning_block("random", seed=7),
}

_OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
WRAPPERS: dict[str, Wrapper] = {
    "fp32-0": Wrapper(0),
    "bf16-0": Wrapper(0, "bf16"),
    "bf16-1": Wrapper(1, "bf16"),
    "bf16-1-BF16_Optimizer": Wrapper(1, "bf16", extra={"data_types": {"grad_accum_dtype": "fp32"}}),
    "bf16-2-round-robin": Wrapper(2, "bf16", {"round_robin_gradients": True}),
    "bf16-2-offload": Wrapper(2, "bf16", _OFFLOAD),
    "fp32-2-offload": Wrapper(2, zero=_OFFLOAD),
    "bf16-2-accumulate-clip": Wrapper(
        2, "bf16", extra={"gradient_accumulation_steps": 2, "gradient_clipping": 1.0}, groups=True
    ),
    "bf16-3": Wrapper(3, "bf16"),
    "bf16-3-offload": Wrapper(3, "bf16", _OFFLOAD),
    "bf16-3-sub-groups": Wrapper(3, "bf16", {"sub_group_size": 5000}),
    "bf16-3-persistent": Wrapper(3, "bf16", {"stage3_param_persistence_threshold": 4000}),
    "fp32-3-groups": Wrapper(3, extra={"gradient_clipping": 0.5}, groups=True),
}


def masks_of_methods(
    stages: tuple[int, ...], methods: tuple[str, ...], steps: int = 9
) -> dict[tuple[str, int], dict[str, Any]]:
    """{(method, stage): final weights, losses, kept counts} of each pruning method on each ZeRO stage."""
    results = {}
    for name in methods:
        for stage in stages:
            model = tiny_bert()
            with engine_of(model, ds_config(stage, METHODS[name])) as engine:
                losses = train(engine, batches(steps))
                stage_object = engine.compression.techniques["sparse_pruning"]
                results[name, stage] = {
                    "losses": losses,
                    "weights": {k: v for k, v in full_weights(model).items() if k in stage_object.targets},
                    "mask_bytes": stage_object.mask_bytes(),
                    "metrics": engine.compression.metrics(),
                }
    return results


def fifty_steps() -> dict[tuple[str, int], dict[str, Any]]:
    """Non-zeros of every weight after 50 steps; each process with data of its own."""
    results = {}
    for method in ("l1", "topk"):
        for stage in STAGES:
            model = tiny_bert()
            block = pruning_block(method, schedule_offset_end=40, schedule_offset_stride=5)
            with engine_of(model, ds_config(stage, block)) as engine:
                train(engine, batches(50, rank=dist.get_rank()))
                targets = engine.compression.techniques["sparse_pruning"].targets
                weights = {k: v for k, v in full_weights(model).items() if k in targets}
            results[method, stage] = {k: (int(v.count_nonzero()), v.numel()) for k, v in weights.items()}
    return results


def wrappers(steps: int = 6) -> dict[str, dict[str, Any]]:
    """Each optimizer wrapper of DeepSpeed keeps exactly the density, at every step, in the 16-bit weights."""
    results = {}
    for name, wrapper in WRAPPERS.items():
        model = tiny_bert()
        config = wrapper.config(pruning_block(density=0.3))
        accumulate = config.get("gradient_accumulation_steps", 1)
        with engine_of(model, config, model_parameters=wrapper.parameters(model)) as engine:
            kept = []
            targets = engine.compression.techniques["sparse_pruning"].targets
            for _ in range(steps):
                train(engine, batches(accumulate, rank=dist.get_rank()))
                weights = full_weights(model)
                kept.append({k: int(weights[k].count_nonzero()) for k in targets})
            results[name] = {
                "wrapper": type(engine.optimizer).__name__,
                "kept": kept,
                "numel": {k: weights[k].numel() for k in targets},
                "applied": engine.compression.applied_steps,
            }
    return results


def faults() -> dict[Any, Any]:
    """NaN gradients are skipped and not counted; NaN weights leave the mask alone."""
    results: dict[Any, Any] = {}
    for stage, dtype in itertools.product(STAGES, ("fp32", "bf16")):
        model = tiny_bert()
        with engine_of(model, ds_config(stage, pruning_block(schedule_offset=3), dtype=dtype)) as engine:
            train(engine, batches(1))
            before = full_weights(model)
            for batch in batches(1):
                loss = engine(**batch).loss
                engine.backward(loss * float("nan") if dist.get_rank() == 0 else loss)
                engine.step()
            after = full_weights(model)
            counted = engine.compression.applied_steps
            losses = train(engine, batches(3))
            results[stage, dtype] = {
                "unchanged": all(torch.equal(before[k], after[k]) for k in before),
                "counted": counted,
                "then": engine.compression.applied_steps,
                "skipped": engine.skipped_steps,
                "finite": all(map(torch.isfinite, map(torch.tensor, losses))),
                "sparsity": engine.compression.metrics()["sparse_pruning/sparsity"],
            }
    return results
