"""Short runs of a tiny BERT, each named; tests compare a run with the same one elsewhere: another ZeRO stage, the CPU,
two processes."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch

import ds_compress  # noqa: F401  (registers)
from ds_compress.engine.zero.fragments import check_fragments
from ds_compress.engine.zero.internals import loss_scale
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, full_weights, pruning_block
from tests.multirank.training import QUANTIZATIONS, quantization_block

STEPS = 8
DENSITY = 0.3
_RISING = {"schedule_offset": 1, "schedule_offset_end": 6, "schedule_offset_stride": 2}
_PATTERNS = {"l1-2:4": {"pattern": "2:4"}, "snip_momentum-4x1": {"pattern": "4x1", **_RISING}}
METHODS: dict[str, dict[str, Any]] = {
    "l1": {},
    "l1-cubic-global": {"scope": "global", **_RISING},
    "l1-regrowth": {"regrowth": True, "scope": "group", **_RISING},
    "taylor": {"scope": "global", **_RISING},
    "movement": {"scope": "group"},
    "topk": {},
    "random": {"seed": 7},
    **_PATTERNS,
}
_STRUCTURES: dict[str, Any] = {"enabled": True, "schedule_offset": 2, "dense_ratio": 0.5}


def structures(**shared: Any) -> dict[str, Any]:
    return {
        "row_pruning": {"shared_parameters": {**_STRUCTURES, "method": "taylor", **shared}},
        "head_pruning": {"shared_parameters": {**_STRUCTURES, "method": "topk", **shared}},
        "depth_pruning": {"shared_parameters": {**_STRUCTURES, "method": "activation", **shared}},
    }


def sparse(method: str) -> dict[str, Any]:
    density = 0.5 if ":" in method else DENSITY
    return pruning_block(method.split("-")[0], density, **METHODS[method])


def everything() -> dict[str, Any]:
    """Half of the weights in two steps, and 8 bits."""
    block = pruning_block("l1", 0.5, schedule_offset=1, schedule_offset_end=3, schedule_offset_stride=1)
    return block | quantization_block()


BLOCKS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "everything": everything(),
    "structures": structures(),
    **{f"sparse {method}": sparse(method) for method in METHODS},
    **{f"quantized {name}": block for name, block in QUANTIZATIONS.items()},
}
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3},
    "2 overlap": {"stage": 2, "zero": {"overlap_comm": True, "reduce_bucket_size": 5000}},
    "3 overlap": {
        "stage": 3,
        "zero": {"overlap_comm": True, "reduce_bucket_size": 5000, "sub_group_size": 5000},
    },
    "1 offload": {"stage": 1, **OFFLOAD},
    "2 offload": {"stage": 2, **OFFLOAD},
    "3 offload": {"stage": 3, **OFFLOAD},
    "3 offload all": {
        "stage": 3,
        "zero": {
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "offload_param": {"device": "cpu", "pin_memory": True},
        },
    },
    "1 fp32 sums": {"stage": 1, "data_types": {"grad_accum_dtype": "fp32"}},
    "2 round robin": {"stage": 2, "zero": {"round_robin_gradients": True}},
}


@contextlib.contextmanager
def engine_of(layout: str, block: dict[str, Any] | None, dtype: str = "fp32", **extra: Any) -> Iterator[Any]:
    """An engine around a new tiny BERT; `dtype` may be "autocast"."""
    from tests.multirank import common

    options = {**LAYOUTS[layout], **extra}
    model, fp16 = options.pop("model", tiny_bert)(), options.pop("fp16", FP16)
    if dtype == "autocast":
        options["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        dtype = "fp32"
    config = ds_config(block=block, dtype=dtype, **options)
    if dtype == "fp16":
        config["fp16"] = fp16
    with common.engine_of(model, config) as engine:
        engine.train()
        yield engine


FP16 = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 3, "hysteresis": 1}
"""Begins with overflows, and rises again in ten steps."""


@torch.no_grad()
def check_masters(engine: Any) -> None:
    """Raises where a 16-bit weight is not its rounded master."""
    check_fragments([f for f in engine.compression.shards.fragments.values() if f.numel])


def run(
    layout: str, block: dict[str, Any] | None, dtype: str = "fp32", steps: int = STEPS, **extra: Any
) -> dict[str, Any]:
    """Losses, gradient norms, loss scales, weights (in CPU memory) and what our metrics say."""
    losses, norms, scales = [], [], []
    with engine_of(layout, block, dtype, **extra) as engine:
        for batch in batches(steps):
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
            norm = engine.get_global_grad_norm()
            norms.append(float(norm) if norm is not None else float("nan"))
            scales.append(loss_scale(engine.optimizer))
        result = {
            "losses": losses,
            "norms": norms,
            "scales": scales,
            "weights": full_weights(engine.module),
            "wrapper": type(engine.optimizer).__name__,
            "optimizer": type(engine.basic_optimizer).__name__,
            "skipped": engine.skipped_steps,
        }
        if block is not None:
            check_masters(engine)
            session = engine.compression
            stage = session.techniques.get("sparse_pruning")
            result |= {
                "applied": session.applied_steps,
                "metrics": session.metrics(),
                "targets": sorted(stage.targets) if stage is not None else [],
                "units": {n: u.tolist() for n, u in session.kept_units.items()},
            }
    return result


@functools.cache
def cached(layout: str, block: str, dtype: str = "fp32") -> dict[str, Any]:
    return run(layout, BLOCKS[block], dtype)


def several(names: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Any]]:
    """{(layout, block): run}, for other processes to do."""
    results = {}
    for layout, block in names:
        results[layout, block] = run(layout, BLOCKS[block])
        gc.freeze()
    return results


def assert_close(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    torch.testing.assert_close(got["losses"], expected["losses"], rtol=0, atol=tolerance)


def assert_same_zeros(got: dict[str, Any], expected: dict[str, Any], flips: float = 0.0) -> None:
    """Masks are equal, but for a share of `flips` of all weights at most."""
    names = expected["targets"]
    assert names and got["targets"] == names
    different = sum(int(((got["weights"][n] != 0) != (expected["weights"][n] != 0)).sum()) for n in names)
    total = sum(expected["weights"][n].numel() for n in names)
    assert different <= flips * total, f"{different} of {total} masked otherwise"


def assert_density(got: dict[str, Any], density: float) -> None:
    kept = sum(int(got["weights"][n].count_nonzero()) for n in got["targets"])
    total = sum(got["weights"][n].numel() for n in got["targets"])
    assert 0 <= kept / total - density < 1e-3, f"{kept} of {total}"
    assert abs(got["metrics"]["sparse_pruning/sparsity"] - (1 - density)) < 1e-3
