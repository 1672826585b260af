"""What a plan will cost: bytes on disk, non-zeros, and bytes of training state; pure arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

from ds_compress.config.report.stored_bytes import format_of, plain_bytes, quantized_bytes
from ds_compress.config.resolve.structures import shape_after, share_after
from ds_compress.config.schema.sparse_pruning import SparsePruningShared
from ds_compress.config.schema.weight_quantization import WeightQuantizationShared
from ds_compress.config.targets import Target, TechniquePlan, Weight
from ds_compress.modelinfo.kinds import ModuleKind

if TYPE_CHECKING:
    from ds_compress.config.report.plan import Plan

_SCALE_BYTES = 4
_HIDDEN_VALUE_BYTES = 4
_SCORE_BYTES = {"topk": 12, "taylor": 4, "movement": 4, "snip_momentum": 4, "l1": 0, "random": 0}
"""Per weight; topk learns its scores: the score and the two moments of its own Adam."""


@dataclass(frozen=True)
class Stored:
    """One or more weights on disk, in bytes.

    before: in the dtype that they have now. after: in the files of an export, see `storage`.
    bitmask: as one bit per weight and the non-zeros only. nonzeros: a count.
    """

    before: int = 0
    after: int = 0
    bitmask: int = 0
    nonzeros: int = 0

    def __add__(self, other: Stored) -> Stored:
        return Stored(
            self.before + other.before,
            self.after + other.after,
            self.bitmask + other.bitmask,
            self.nonzeros + other.nonzeros,
        )


@dataclass(frozen=True)
class TrainingState:
    """Bytes that one process holds of pruning's own state, when all processes share it evenly."""

    mask: int = 0
    hidden: int = 0
    scores: int = 0

    @property
    def total(self) -> int:
        return self.mask + self.hidden + self.scores


def stored(plan: Plan) -> dict[str, Stored]:
    """Every parameter of the model by name, as it will be stored."""
    pruned = {target.param_name: target for target in _targets(plan, "sparse_pruning")}
    quantized = {target.param_name: target for target in _targets(plan, "weight_quantization")}
    return {
        weight.name: _stored_weight(plan, weight, pruned.get(weight.name), quantized.get(weight.name))
        for weight in plan.weights
    }


def total(parts: Iterable[Stored]) -> Stored:
    """All of them together."""
    return sum(parts, Stored())


def training_state(plan: Plan) -> TrainingState:
    """What pruning keeps in memory beside the weights, per process."""
    technique = plan.techniques.get("sparse_pruning")
    if technique is None:
        return TrainingState()
    shared: SparsePruningShared = technique.shared
    share = -(-sum(math.prod(target.shape) for target in technique.targets) // plan.world_size)
    return TrainingState(
        mask=-(-share // 8),
        hidden=_HIDDEN_VALUE_BYTES * share if shared.effective_regrowth else 0,
        scores=_SCORE_BYTES[shared.method] * share,
    )


def scales_of(target: Target, shared: WeightQuantizationShared) -> int:
    """How many scales one weight has."""
    outputs = target.shape[1] if target.kind is ModuleKind.CONV1D else target.shape[0]
    match shared.granularity:
        case None | "per_group" if target.kind is ModuleKind.EMBEDDING:
            return target.shape[0]
        case None | "per_group":
            return shared.quantize_groups
        case "per_tensor":
            return 1
        case "per_channel":
            return outputs
        case _:
            inputs = math.prod(target.shape) // outputs
            return outputs * math.ceil(inputs / shared.effective_group_size)


def _targets(plan: Plan, key: str) -> tuple[Target, ...]:
    technique: TechniquePlan | None = plan.techniques.get(key)
    return technique.targets if technique else ()


def _stored_weight(plan: Plan, weight: Weight, pruned: Target | None, quantized: Target | None) -> Stored:
    shape = shape_after(plan.structures, weight.name, weight.shape)
    numel, stays = math.prod(shape), share_after(plan.structures, weight.name)
    before, format = math.prod(weight.shape) * weight.itemsize, format_of(plan)
    # The decimal of the JSON, not its binary neighbour: 0.07 of 100 is 7.
    nonzeros = math.ceil(Fraction(repr(pruned.params.dense_ratio)) * numel) if pruned else numel
    bits, scale_bytes, after = 8 * weight.itemsize, 0, plain_bytes(weight, shape, format)
    if quantized:
        shared: WeightQuantizationShared = plan.techniques["weight_quantization"].shared
        per_scale = _SCALE_BYTES * (2 if shared.quantization_type == "asymmetric" else 1)
        scales = scales_of(replace(quantized, shape=shape), shared)
        bits, scale_bytes = quantized.params.target_bits, per_scale * scales
        stored = quantized_bytes(plan, weight, quantized, shape, format, has_zeros=pruned is not None)
        # A tied weight that only one of its users quantizes is stored for the other, too.
        after = stored + (after if len(weight.users) > 1 else 0)
    bitmask = _bytes(numel) + _bytes(nonzeros * bits) + scale_bytes if pruned else after
    return Stored(before, int(after * stays), int(bitmask * stays), int(nonzeros * stays))


def _bytes(bits: int) -> int:
    return -(-bits // 8)
