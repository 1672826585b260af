"""Bytes that one process holds in the middle of a training: when gradients are reduced, before the optimizer's step.

As DeepSpeed 0.19 holds them on a device, without offload. What comes and goes within a step is no part of it: it is
listed by `passing`, or by `NOT_COUNTED` where it depends on more than shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.schema.block import TrainingState
from ds_compress.config.targets import Weight
from ds_compress.estimate.buckets import flat_numel, owned_by_each, owned_numel, shard_numel, touched_by_each
from ds_compress.estimate.run_layout import RunLayout
from ds_compress.estimate.teacher import teacher_bytes
from ds_compress.ops.sizes import payload_bytes
from ds_compress.reduce.pipeline import IN_FLIGHT
from ds_compress.reduce.uncompressed import is_sent_uncompressed

NOT_COUNTED = (
    "not counted: activations (what fake quantization adds to them --tokens says), learned scales, latent weights of "
    "structured pruning, logits, fragmentation and what the allocator, CUDA, NCCL and Python take"
)
_FP32 = 4
_LIVE = _SUB_GROUP = 1_000_000_000
"""DeepSpeed's defaults of `stage3_max_live_parameters` and `sub_group_size`, elements."""
_RESIDUAL_BLOCK = 512
_OF_THE_STEP_BEFORE = 2
"""Residuals and momenta are held as they were, too, until the step is applied."""


@dataclass(frozen=True)
class Held:
    """Bytes of one process, of the one that holds most.

    weights: as forward reads them, sharded under ZeRO-3. gradients: kept for the step. masters: fp32 weights beside
    those. moments: of the optimizer. buckets: of gradients, where they stay allocated. communication: residuals of
    error feedback, worker momenta, and the copy that deltas of weights are made from. teacher: None: not known.
    """

    weights: int
    gradients: int
    masters: int
    moments: int
    buckets: int
    communication: int
    masks: int
    latent: int
    scores: int
    teacher: int | None

    @property
    def total(self) -> int:
        return sum(value for value in self.rows().values() if value is not None)

    def rows(self) -> dict[str, int | None]:
        """By name, in order."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def held(plan: ResolvedPlan, layout: RunLayout, teacher: Sequence[Weight] | None = None) -> Held:
    """Of a run of `plan`. teacher: the weights of another model that teaches; None: there is none, or not known."""
    trained = [weight for weight in plan.weights if weight.trainable]
    own = owned_numel(trained, layout)
    item = _item(plan.weights, layout)
    is_plain_fp32 = layout.stage == 0 and layout.weight_bytes is None
    gradients, state = _most(_gradients(trained, own, layout, item), _state(plan, layout))
    masks = _structured_masks(plan, layout)
    return Held(
        weights=_weights(plan.weights, trained, layout, item),
        gradients=gradients,
        masters=0 if is_plain_fp32 else _FP32 * own,
        moments=layout.moments * (item if is_plain_fp32 else _FP32) * own,
        buckets=_buckets(trained, layout, item),
        communication=_communication(plan, trained, layout, item),
        masks=state.mask + masks,
        latent=state.latent,
        scores=state.scores,
        teacher=teacher_bytes(plan, layout, teacher),
    )


def passing(plan: ResolvedPlan, layout: RunLayout) -> Iterator[tuple[str, int]]:
    """(what, bytes at most) that is held for a part of a step, beside `held`; not all at once."""
    trained = [weight for weight in plan.weights if weight.trainable]
    numel, item = sum(weight.numel for weight in trained), _item(plan.weights, layout)
    own, wire = owned_numel(trained, layout), layout.wire_bytes or item
    if layout.stage == 1 and not layout.is_bf16_optimizer:
        yield "whole gradients until they are reduced", numel * item
    if layout.stage in (1, 2) and not layout.is_bf16_optimizer:
        yield "a bucket of gradients in backward (two with overlap_comm)", layout.bucket * wire
    if layout.stage == 3:
        yield "layers that are gathered whole (max_live_parameters)", min(numel, _LIVE) * item
    kept = layout.kept_gradient_bytes or item
    if kept < _FP32 and trained:
        yield (
            "gradients in fp32 in the optimizer's step",
            _FP32 * (min(own, 1_000_000_000) if layout.stage == 3 else own),
        )

    yield from _chunks_in_flight(plan, layout)
    scores = max(state.scores for state in _state(plan, layout))
    if scores:
        yield "scores of the mask before, in a step that makes a new one", scores


def _chunks_in_flight(plan: ResolvedPlan, layout: RunLayout) -> Iterator[tuple[str, int]]:
    """Of what is quantized: as it was sent and as it arrived. A layer of ZeRO-3 is fetched as a whole."""
    config, trained = plan.config, sum(weight.numel for weight in plan.weights if weight.trainable)
    for block in (config.gradient_compression, config.parameter_compression if layout.stage < 3 else None):
        if block is not None and block.enabled and layout.world_size > 1:
            of_all = min(trained, layout.bucket) if block is config.gradient_compression else trained
            numel = min(block.chunk_elements(layout.world_size), of_all)
            payloads = payload_bytes(numel, block.bits, block.effective_block_size)
            yield f"chunks of {block.key} in flight", 2 * IN_FLIGHT * payloads


def _item(weights: Sequence[Weight], layout: RunLayout) -> int:
    return layout.weight_bytes or max((weight.itemsize for weight in weights), default=_FP32)


def _weights(weights: Sequence[Weight], trained: Sequence[Weight], layout: RunLayout, item: int) -> int:
    frozen = sum(weight.numel for weight in weights if not weight.trainable)
    if layout.stage == 0:
        return item * (sum(weight.numel for weight in trained) + frozen)
    if layout.stage < 3:
        return item * (flat_numel(trained, layout.world_size) + frozen)
    sharded = sum(shard_numel(weight, layout.world_size) for weight in weights)
    return item * (sharded + sum(weight.numel for weight in weights if weight.numel <= layout.persistent))


def _gradients(trained: Sequence[Weight], own: int, layout: RunLayout, item: int) -> list[int]:
    """Of each process; one number where all keep as many."""
    if layout.is_bf16_optimizer:
        return [sum(weight.numel for weight in trained) * (item + _FP32)]
    if layout.stage == 0:
        return [own * item]
    kept = layout.kept_gradient_bytes or item
    if layout.stage in (1, 2) and not (kept == _FP32 and item < _FP32):
        # Of a weight that is cut between processes each keeps the whole gradient; fp32 sums of 16 bits are cut.
        return [numel * kept for numel in touched_by_each(trained, layout)]
    return [own * kept]


def _most(gradients: Sequence[int], states: Sequence[TrainingState]) -> tuple[int, TrainingState]:
    """Of the process with most of both: slices of ZeRO-1 and 2 are of neighbouring layers."""
    processes = max(len(gradients), len(states))
    return max(
        ((gradients[at % len(gradients)], states[at % len(states)]) for at in range(processes)),
        key=lambda both: both[0] + both[1].total,
    )


def _buckets(trained: Sequence[Weight], layout: RunLayout, item: int) -> int:
    if layout.stage == 3 and layout.contiguous:
        return layout.bucket * (layout.wire_bytes or item)
    return 0


def _communication(plan: ResolvedPlan, trained: Sequence[Weight], layout: RunLayout, item: int) -> int:
    if layout.world_size == 1:
        return 0
    config, found = plan.config, 0.0
    gradients, parameters, robust = (
        config.gradient_compression,
        config.parameter_compression,
        config.robust_reduction,
    )
    if gradients is not None and gradients.enabled:
        bits = gradients.effective_error_feedback_bits
        if bits is not None:
            quantized = [weight for weight in trained if not is_sent_uncompressed(weight.shape)]
            of_all = sum(
                2 * w.numel if bits == 16 else payload_bytes(w.numel, 8, _RESIDUAL_BLOCK) for w in quantized
            )
            summed = of_all / layout.world_size if layout.stage == 0 or layout.is_bf16_optimizer else 0
            sent = of_all / (layout.ranks_per_node if gradients.hierarchical else 1)
            found += _OF_THE_STEP_BEFORE * (sent + summed)
    if robust is not None and robust.enabled and robust.worker_momentum:
        found += _OF_THE_STEP_BEFORE * 2 * sum(weight.numel for weight in trained)
    if parameters is not None and parameters.enabled and layout.stage in (1, 2) and trained:
        numel = flat_numel(trained, layout.world_size)
        found += numel // layout.world_size * item if numel >= parameters.min_elements else 0
    return math.ceil(found)


def _state(plan: ResolvedPlan, layout: RunLayout) -> list[TrainingState]:
    """Of each process; one where all hold as much."""
    trained = [weight for weight in plan.weights if weight.trainable]
    found = [TrainingState()] * (layout.world_size if layout.stage in (1, 2) else 1)
    for key, technique in plan.techniques.items():
        names = {target.param_name for target in technique.targets} & {weight.name for weight in trained}
        every = sum(weight.numel for weight in trained if weight.name in names)
        even = plan.weight_block(key).training_state(technique.targets, layout.shards)
        owned = owned_by_each(trained, names, layout)
        found = [
            state + _part(even, numel * layout.shards / every if every else 1.0)
            for state, numel in zip(found, owned, strict=True)
        ]
    return found


def _part(even: TrainingState, share: float) -> TrainingState:
    """share: of a process, 1 where all own as much."""
    return TrainingState(*(math.ceil(kind * share) for kind in (even.mask, even.latent, even.scores)))


def _structured_masks(plan: ResolvedPlan, layout: RunLayout) -> int:
    """A bit for each element of every weight that loses units."""
    masked = {
        member.tensor
        for structures in plan.structures.values()
        for target in structures.targets
        for member in target.structure.slices
        if member.masked
    }
    numel = sum(weight.numel for weight in plan.weights if weight.name in masked)
    return -(-numel // (8 * layout.shards))
