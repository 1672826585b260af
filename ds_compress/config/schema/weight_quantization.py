"""`weight_quantization`: how many bits a weight gets, on which grid, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.schema import int8_limits, stored_bytes, weight_limits
from ds_compress.config.schema.block import LAYERS, ScheduleEnd, WeightBlock, WeightSize, plural, steps
from ds_compress.config.schema.fields import (
    Conflict,
    ExcludedModules,
    Group,
    Groups,
    Ratio,
    Seed,
    Step,
    StrictBool,
    StrictInt,
    StrictModel,
    without_effect,
)
from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.errors import Problem
from ds_compress.modelinfo.kinds import ModuleKind

Granularity = Literal["per_tensor", "per_group", "per_channel", "per_column_group"]
QuantizationType = Literal["symmetric", "asymmetric"]
_DEFAULT_COLUMNS_PER_SCALE = 128
_FEWEST_BITS_OF_A_GRID = 3


class WeightQuantizationParams(StrictModel):
    """`params` of one group."""

    target_bits: Annotated[StrictInt, Field(ge=1, le=8)] = Field(
        description="Bits in the end: 1 binary, 2 ternary, 3 to 8 a uniform grid."
    )
    start_bits: Annotated[StrictInt, Field(ge=1, le=32)] = Field(
        default_factory=lambda others: others.get("target_bits", 8),
        description="Bits at schedule_offset; above 8 the weight is not quantized yet; absent: target_bits.",
    )
    quantization_period: Step = Field(
        default=1,
        description="Applied steps until bits drop by one; doubles then. 0: target_bits at once.",
    )

    @property
    def first_bits(self) -> int:
        """Bits at schedule_offset: start_bits, unless a period of 0 leaves no time for a ladder."""
        return self.start_bits if self.quantization_period else self.target_bits

    def last_drop(self, schedule_offset: int) -> int:
        """The applied step from which weights have target_bits: drops are P, 2P, 4P, ... after the offset."""
        drops = self.first_bits - self.target_bits
        return schedule_offset + (self.quantization_period * 2 ** (drops - 1) if drops else 0)

    def conflicts(self) -> Iterator[Conflict]:
        if self.start_bits < self.target_bits:
            yield Conflict(
                ("start_bits",),
                self.start_bits,
                f"at least target_bits ({self.target_bits}): bits only fall",
                f"to keep {self.target_bits} bits throughout, set start_bits to {self.target_bits}",
            )


class WeightQuantizationGroup(Group):
    """Weights that get the same number of bits."""

    params: WeightQuantizationParams = Field(description="What differs between groups.")


class MixedQuantization(StrictModel):
    """Legacy: a blend of the real and the quantized weight, in which the real share decays from 1 to 0."""

    enabled: StrictBool = Field(default=False, description="Whether weights are blended.")
    quantize_change_ratio: Ratio = Field(
        default=0.001, description="What the real share loses at each applied step."
    )


class WeightQuantizationShared(StrictModel):
    """What holds for all groups of `weight_quantization`."""

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    quantizer_kernel: StrictBool = Field(
        default=False,
        description="Legacy: insist on the native quantizer; without it the run does not start.",
    )
    kernel: Literal["float", "int8"] = Field(
        default="float",
        description=(
            "What Linear and Conv1D multiply in forward: float: values that were rounded to their grids; "
            "int8: the 8-bit codes themselves, as deployment will (needs activation_quantization)."
        ),
    )
    schedule_offset: Step = Field(
        default=0, description="Applied optimizer steps before weights are quantized."
    )
    quantize_groups: Annotated[StrictInt, Field(ge=1)] = Field(
        default=1, description="Scales per weight: the flattened weight is cut into so many equal parts."
    )
    quantize_verbose: StrictBool = Field(default=False, description="Log each change of bits.")
    quantization_type: QuantizationType = Field(
        default="symmetric", description="Whether the grid is centred on zero."
    )
    quantize_weight_in_forward: StrictBool = Field(
        default=False,
        description=(
            "Weights are fake-quantized in forward, with a straight-through gradient. true: it is zero where a value "
            "clips; false: it passes everywhere, as when the removed library rounded the weight after each step."
        ),
    )
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="How a weight finds its grid point."
    )
    fp16_mixed_quantize: MixedQuantization = Field(
        default_factory=MixedQuantization, description="Legacy: fade the quantized weight in."
    )
    granularity: Granularity | None = Field(
        default=None,
        description=(
            "Weights that share a scale; absent or per_group: quantize_groups parts of the flattened weight, "
            "embeddings one scale per row."
        ),
    )
    group_size: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Columns that share a scale; only with per_column_group, where absent means 128.",
    )
    narrow_range: StrictBool | None = Field(
        default=None,
        description=(
            "true: the grid is symmetric and reaches +max and -max; false: the legacy grid, which cannot "
            "represent +max; absent: true with learned_scale or a granularity other than per_group, and for pruned "
            "weights on an asymmetric grid, whose zeros the legacy one cannot represent."
        ),
    )
    learned_scale: StrictBool = Field(
        default=False, description="Train the scales (LSQ); symmetric, nearest and at least 2 bits only."
    )
    seed: Seed | None = Field(
        default=None, description="Seed of stochastic rounding; absent: the seed of the whole block."
    )
    excluded_modules: ExcludedModules = ()

    @property
    def effective_narrow_range(self) -> bool:
        """`narrow_range`, or the better grid wherever no legacy config can have asked for the old one."""
        if self.narrow_range is not None:
            return self.narrow_range
        return self.learned_scale or self.granularity not in (None, "per_group")

    @property
    def effective_group_size(self) -> int:
        """Columns that share a scale under per_column_group."""
        return self.group_size or _DEFAULT_COLUMNS_PER_SCALE

    def conflicts(self) -> Iterator[Conflict]:
        if self.group_size is not None and self.granularity != "per_column_group":
            yield Conflict(
                ("group_size",),
                self.group_size,
                'nothing, unless granularity is "per_column_group"',
                'set granularity to "per_column_group" or remove "group_size"',
            )
        if self.quantize_groups != 1 and self.granularity not in (None, "per_group"):
            yield Conflict(
                ("quantize_groups",),
                self.quantize_groups,
                f"1 when granularity is {self.granularity}",
                'remove "quantize_groups", or set granularity to "per_group"',
            )
        yield from without_effect(self, "seed", self.rounding == "nearest", 'rounding is "stochastic"')
        if self.learned_scale and self.quantization_type != "symmetric":
            yield Conflict(
                ("quantization_type",), self.quantization_type, '"symmetric", because learned_scale is true'
            )
        if self.learned_scale and self.rounding != "nearest":
            yield Conflict(("rounding",), self.rounding, '"nearest", because learned_scale is true')


class WeightQuantizationConfig(WeightBlock):
    """Trains weights so that they survive being stored with few bits."""

    key = "weight_quantization"
    uses_kernels = True
    is_in_forward = True
    layer_kinds = LAYERS | {ModuleKind.EMBEDDING}
    column = "weights"

    shared_parameters: WeightQuantizationShared = Field(
        default_factory=WeightQuantizationShared, description="What holds for all groups."
    )
    different_groups: Groups[WeightQuantizationGroup] = Field(default_factory=dict)

    def conflicts(self) -> Iterator[Conflict]:
        shared = self.shared_parameters
        if shared.enabled and not self.different_groups:
            yield Conflict(
                ("different_groups",),
                None if not self.given("different_groups") else {},
                "at least one group with start_bits and target_bits",
                'for every layer in 8 bits: {"all": {"params": {"start_bits": 8, "target_bits": 8}}}',
            )
        yield from self._of_thresholds()
        for name, group in self.different_groups.items():
            where = ("different_groups", name, "params", "target_bits")
            bits = group.params.target_bits
            if shared.learned_scale and bits < 2:
                yield Conflict(where, bits, "at least 2, because learned_scale is true")
            if shared.quantization_type == "asymmetric" and bits < _FEWEST_BITS_OF_A_GRID:
                yield Conflict(
                    where,
                    bits,
                    "at least 3, because quantization_type is asymmetric",
                    'binary (1) and ternary (2) weights are symmetric: set quantization_type to "symmetric"',
                )

    def _of_thresholds(self) -> Iterator[Conflict]:
        """What binary and ternary codes, which come from a sign and a threshold, know nothing of."""
        shared = self.shared_parameters
        bits = [group.params.first_bits for group in self.different_groups.values()]
        none_is_rounded = bool(bits) and max(bits) < _FEWEST_BITS_OF_A_GRID and not shared.learned_scale
        path, needed = ("shared_parameters",), f"a group has at least {_FEWEST_BITS_OF_A_GRID} bits"
        yield from without_effect(shared, "narrow_range", none_is_rounded, needed, path)
        if shared.rounding == "stochastic":
            yield from without_effect(shared, "rounding", none_is_rounded, needed, path)

    @property
    def insists_on_native(self) -> str | None:
        return "shared_parameters.quantizer_kernel" if self.shared_parameters.quantizer_kernel else None

    def describe_settings(self) -> str:
        shared = self.shared_parameters
        clips = shared.quantize_weight_in_forward or shared.learned_scale
        gradient = "straight-through gradient" + (", zero where it clips" if clips else "")
        grid = "narrow grid" if shared.effective_narrow_range else "legacy grid"
        if shared.quantization_type == "asymmetric" and shared.narrow_range is None and "legacy" in grid:
            grid += ", narrow for pruned weights"
        rounding = f"{shared.rounding} rounding"
        facts = [shared.quantization_type, rounding, grid, f"fake quantization in forward, {gradient}"]
        if shared.learned_scale:
            facts.append("learned scales")
        if shared.fp16_mixed_quantize.enabled:
            facts.append(f"faded in by {shared.fp16_mixed_quantize.quantize_change_ratio:g} per step")
        return ", ".join(facts)

    def describe_target(self, target: Target) -> str:
        params, shared = target.params, self.shared_parameters
        first = f"{params.start_bits} -> " if params.first_bits != params.target_bits else ""
        when = steps(shared.schedule_offset, params.last_drop(shared.schedule_offset))
        return f"{first}{params.target_bits} bits, {self._granularity_of(target)}, {when}"

    def _granularity_of(self, target: Target) -> str:
        shared = self.shared_parameters
        if shared.granularity == "per_column_group":
            return f"per {shared.effective_group_size} columns"
        if shared.granularity not in (None, "per_group"):
            return str(shared.granularity)
        if target.kind is ModuleKind.EMBEDDING:
            return "per row"
        return plural(shared.quantize_groups, "group")

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        shared = self.shared_parameters
        for group, settings in self.different_groups.items():
            last = settings.params.last_drop(shared.schedule_offset)
            if settings.params.first_bits != settings.params.target_bits:
                keys: tuple[str, ...] = ("different_groups", group, "params", "quantization_period")
                yield ScheduleEnd(keys, settings.params.quantization_period, last)
            else:
                yield ScheduleEnd(("shared_parameters", "schedule_offset"), shared.schedule_offset, last)
            if shared.fp16_mixed_quantize.enabled:
                ratio = shared.fp16_mixed_quantize.quantize_change_ratio
                keys = ("shared_parameters", "fp16_mixed_quantize", "quantize_change_ratio")
                yield ScheduleEnd(keys, ratio, last + math.ceil(1 / ratio))

    def estimate(self, size: WeightSize, target: Target, format: str, packs: bool) -> WeightSize:
        return stored_bytes.quantized(size, target, self.shared_parameters, format, packs)

    def limits(self, targets: Sequence[Target]) -> Iterator[Problem]:
        yield from weight_limits.uneven_groups(self.key, self.shared_parameters, targets)
        yield from weight_limits.unsuitable_embeddings(self.key, self.shared_parameters, targets)

    def limits_beside(
        self, techniques: Mapping[str, TechniquePlan], shapes_after: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Problem]:
        yield from int8_limits.problems(techniques)
        yield from weight_limits.groups_that_a_cut_breaks(techniques[self.key], shapes_after)
        yield from weight_limits.grids_without_zero(techniques[self.key])
