"""Bytes of a teacher in one process."""

from __future__ import annotations

from collections.abc import Sequence

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.targets import Weight
from ds_compress.estimate.buckets import owned_numel, shard_numel
from ds_compress.estimate.run_layout import RunLayout

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4


def teacher_bytes(plan: ResolvedPlan, layout: RunLayout, given: Sequence[Weight] | None) -> int | None:
    """given: the weights of another model that teaches. None: one teaches whose size nobody has said."""
    block = plan.config.distillation
    if block is None or not block.enabled or block.teacher_cache is not None:
        return 0
    self_teacher = block.self_teacher
    if self_teacher is not None and self_teacher.weights == "current":
        return 0
    if self_teacher is not None and self_teacher.weights == "ema":
        trained = [weight for weight in plan.weights if weight.trainable]
        return _FP32 * owned_numel(trained, layout)
    weights = plan.weights if self_teacher is not None else given
    if weights is None:
        return None
    parts = layout.world_size if block.teacher_zero_stage == 3 else 1
    return sum(
        shard_numel(weight, parts) * _BYTES.get(str(block.teacher_dtype), weight.itemsize)
        for weight in weights
    )
