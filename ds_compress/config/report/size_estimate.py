"""What a plan will cost: bytes on disk, non-zeros, and bytes of training state; pure arithmetic on shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from ds_compress.config.report.resolved import ResolvedPlan
from ds_compress.config.schema.block import TrainingState, WeightSize
from ds_compress.config.schema.stored_bytes import plain_bytes
from ds_compress.config.structure_targets import ShapesLeft
from ds_compress.config.targets import Target, Weight
from ds_compress.modelinfo.kinds import ModuleKind


@dataclass(frozen=True)
class Stored:
    """One or more weights on disk, in bytes.

    before: in the dtype that they have now. after: in the files of an export, see `config.schema.stored_bytes`.
    bitmask: as one bit per weight and the non-zeros only. nonzeros: a count. active_before, active_after: what a token
    needs of before and after, of experts the share of those that see it.
    """

    before: int = 0
    after: int = 0
    bitmask: int = 0
    nonzeros: int = 0
    active_before: int = 0
    active_after: int = 0

    def __add__(self, other: Stored) -> Stored:
        return Stored(
            self.before + other.before,
            self.after + other.after,
            self.bitmask + other.bitmask,
            self.nonzeros + other.nonzeros,
            self.active_before + other.active_before,
            self.active_after + other.active_after,
        )


def stored(plan: ResolvedPlan) -> dict[str, Stored]:
    """Every parameter of the model by name, as it will be stored."""
    claims: dict[str, dict[str, Target]] = {}
    for key, technique in plan.techniques.items():
        for target in technique.targets:
            claims.setdefault(target.param_name, {})[key] = target
    left, format = ShapesLeft(plan.structures), format_of(plan)
    return {
        weight.name: _stored_weight(plan, weight, claims.get(weight.name, {}), left, format)
        for weight in plan.weights
    }


def total(parts: Iterable[Stored]) -> Stored:
    """All of them together."""
    return sum(parts, Stored())


def training_state(plan: ResolvedPlan) -> TrainingState:
    """What techniques keep in memory beside the weights, per process."""
    parts = (
        plan.weight_block(key).training_state(technique.targets, plan.world_size)
        for key, technique in plan.techniques.items()
    )
    return sum(parts, TrainingState())


def format_of(plan: ResolvedPlan) -> str:
    """The one that the block names, else the one that an export chooses, "torch" where that has no words."""
    named = plan.config.export_to
    if named is not None:
        return named
    technique = plan.techniques.get("weight_quantization")
    if technique is None:
        return "compressed-tensors" if "activation_quantization" in plan.techniques else "hf"
    kinds = {target.kind for target in technique.targets}
    fits = (
        kinds <= {ModuleKind.LINEAR, ModuleKind.EMBEDDING}
        and technique.shared.quantization_type != "asymmetric"
    )
    return "compressed-tensors" if fits else "torch"


def _stored_weight(
    plan: ResolvedPlan, weight: Weight, claims: dict[str, Target], structures: ShapesLeft, format: str
) -> Stored:
    shape = structures.shape(weight.name, weight.shape)
    numel, share = math.prod(shape), structures.share(weight.name)
    plain = plain_bytes(weight, shape, format)
    size = WeightSize(shape, numel, numel, 8 * weight.itemsize, plain, users=len(weight.users))
    for key, target in claims.items():
        size = plan.weight_block(key).estimate(size, target, format, plan.packs)
    bitmask = size.bytes
    if size.is_sparse:
        bitmask = _bytes(numel) + _bytes(size.nonzeros * size.bits) + size.scale_bytes
    before = math.prod(weight.shape) * weight.itemsize
    # A container of format "torch" is smaller still: it deflates both, and leaves out what rounding makes 0, too.
    after = int((min(size.bytes, bitmask) if format == "torch" else size.bytes) * share)
    active = Fraction(weight.chosen, weight.experts)
    is_stack = len(weight.shape) > 1 and weight.shape[0] == weight.experts
    # A stack of experts loses a part of each tensor, a list of them whole tensors.
    left = Fraction(shape[0], weight.experts) if is_stack else share
    return Stored(
        before,
        after,
        int(bitmask * share),
        int(size.nonzeros * share),
        int(before * active),
        int(after * min(Fraction(1), active / left)),
    )


def _bytes(bits: int) -> int:
    return -(-bits // 8)
