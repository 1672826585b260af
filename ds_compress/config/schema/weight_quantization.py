"""`weight_quantization`: how many bits a weight gets, on which grid, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.schema import float_limits, int8_limits, stored_bytes, weight_limits
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
from ds_compress.config.schema.formats import INTEGERS, SQUARE, FormatParams, described
from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.errors import Problem
from ds_compress.modelinfo.kinds import ModuleKind

Granularity = Literal["per_tensor", "per_group", "per_channel", "per_column_group", "per_block"]
Scales = Literal["dynamic", "static", "searched", "learned"]
QuantizationType = Literal["symmetric", "asymmetric"]
_DEFAULT_COLUMNS_PER_SCALE = 128
_FEWEST_BITS_OF_A_GRID = 3


class WeightQuantizationParams(FormatParams):
    """`params` of one group."""

    target_bits: Annotated[StrictInt, Field(ge=1, le=8)] | None = Field(
        default=None,
        description="Bits of integers in the end: 1 binary, 2 ternary, 3 to 8 a uniform grid. Of floats: absent.",
    )
    start_bits: Annotated[StrictInt, Field(ge=1, le=32)] = Field(
        default_factory=lambda others: others.get("target_bits") or 8,
        description="Bits at schedule_offset; above 8 the weight is not quantized yet; absent: target_bits.",
    )
    quantization_period: Step = Field(
        default=1,
        description="Applied steps until bits drop by one; doubles then. 0: target_bits at once.",
    )
    granularity: Granularity | None = Field(
        default=None,
        description="Weights of this group that share a scale; absent: as the format or shared_parameters say.",
    )

    @property
    def final_bits(self) -> int:
        """Of one stored value."""
        known = self.number_format
        if known is not None:
            return known.bits
        return self.target_bits or 8

    @property
    def first_bits(self) -> int:
        """Bits at schedule_offset: start_bits, unless a period of 0 leaves no time for a ladder."""
        return self.start_bits if self.quantization_period and self.format == INTEGERS else self.final_bits

    def last_drop(self, schedule_offset: int) -> int:
        """The applied step from which weights are in their last format: bits drop P, 2P, 4P, ... after the offset."""
        schedule_offset += self.warm_up
        drops = self.first_bits - self.final_bits
        return schedule_offset + (self.quantization_period * 2 ** (drops - 1) if drops else 0)

    def conflicts(self) -> Iterator[Conflict]:
        yield from self.format_conflicts(("target_bits", "start_bits", "quantization_period"))
        yield from self._of_sharing()
        if self.format != INTEGERS:
            return
        if self.target_bits is None:
            yield Conflict(
                ("target_bits",), None, "a whole number >= 1 and <= 8", "add it, or a float format"
            )
        elif self.start_bits < self.target_bits:
            yield Conflict(
                ("start_bits",),
                self.start_bits,
                f"at least target_bits ({self.target_bits}): bits only fall",
                f"to keep {self.target_bits} bits throughout, set start_bits to {self.target_bits}",
            )
        elif self.earlier_formats and self.first_bits != self.target_bits:
            yield Conflict(
                ("start_bits",), self.start_bits, "target_bits beside earlier_formats: one schedule at a time"
            )

    def _of_sharing(self) -> Iterator[Conflict]:
        known = self.number_format
        fixed = known is not None and known.block is not None
        if fixed and self.granularity not in (None, "per_column_group"):
            yield Conflict(
                ("granularity",),
                self.granularity,
                f"nothing: {self.format} has a scale for each {known.block if known else ''} inputs",
                'remove "granularity"',
            )
        if self.group_size is not None and not fixed and self.granularity != "per_column_group":
            yield Conflict(
                ("group_size",),
                self.group_size,
                'nothing, unless granularity is "per_column_group" in the same group',
                'add "granularity": "per_column_group", or remove "group_size"',
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
    kernel: Literal["float", "int8", "fp8"] = Field(
        default="float",
        description=(
            "What Linear and Conv1D multiply in forward: float: values that were rounded to their grids; "
            "int8, fp8: the 8-bit codes themselves, as deployment will (needs activation_quantization)."
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
    scales: Scales | None = Field(
        default=None,
        description=(
            "dynamic: chosen from the weights at each forward; static: as they are chosen at the start; searched: "
            "those of some candidates with the least squared error at the start (nvfp4: four over six); learned: "
            "trained (LSQ), searched before for floats. Absent: learned with learned_scale, else dynamic."
        ),
    )
    train: Literal["all", "scales"] = Field(
        default="all",
        description="scales: every weight of the model is frozen, and only learned scales train.",
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
        return self.has_given_scales or self.granularity not in (None, "per_group")

    @property
    def effective_scales(self) -> Scales:
        """`scales`, or what the older key `learned_scale` means."""
        return self.scales or ("learned" if self.learned_scale else "dynamic")

    @property
    def has_given_scales(self) -> bool:
        """Whether scales are parameters of the model, trained or not, and not chosen from the weights at hand."""
        return self.effective_scales != "dynamic"

    @property
    def effective_group_size(self) -> int:
        """Columns that share a scale under per_column_group."""
        return self.group_size or _DEFAULT_COLUMNS_PER_SCALE

    def granularity_of(self, params: WeightQuantizationParams) -> Granularity | None:
        """Which weights of a group share a scale; None: per_group, or per row of an embedding."""
        known = params.number_format
        if known is not None and known.block is not None:
            return "per_column_group"
        if params.granularity is not None:
            return params.granularity
        if known is not None and self.granularity in (None, "per_group"):
            return "per_channel"
        return self.granularity

    def group_size_of(self, params: WeightQuantizationParams) -> int:
        """Columns, or rows and columns of a square block, that share a scale."""
        known = params.number_format
        if self.granularity_of(params) == "per_block":
            return SQUARE
        if known is not None and known.block is not None:
            return params.group_size or known.block
        return params.group_size or self.effective_group_size

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
        if self.learned_scale and self.scales not in (None, "learned"):
            yield Conflict(
                ("scales",), self.scales, '"learned", because learned_scale is true', "remove one of them"
            )
        elif self.has_given_scales:
            yield from self._of_given_scales()
        if self.train == "scales" and self.effective_scales != "learned":
            yield Conflict(("train",), "scales", 'scales "learned" beside it', 'add "scales": "learned"')

    def _of_given_scales(self) -> Iterator[Conflict]:
        why = "learned_scale is true" if self.learned_scale else f'scales is "{self.effective_scales}"'
        if self.quantization_type != "symmetric":
            yield Conflict(("quantization_type",), self.quantization_type, f'"symmetric", because {why}')
        if self.rounding != "nearest":
            yield Conflict(("rounding",), self.rounding, f'"nearest", because {why}')
        if self.effective_scales in ("static", "searched") and self.schedule_offset:
            yield Conflict(
                ("schedule_offset",),
                self.schedule_offset,
                f"0, because {why}: scales are chosen from the weights of the start",
                'use "dynamic" or "learned"',
            )


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
            bits = group.params.final_bits
            yield from self._of_format(name, group.params)
            if shared.has_given_scales and bits < 2:
                yield Conflict(where, bits, "at least 2, because scales are no function of the weights")
            if (
                group.params.format == INTEGERS
                and shared.quantization_type == "asymmetric"
                and bits < _FEWEST_BITS_OF_A_GRID
            ):
                yield Conflict(
                    where,
                    bits,
                    "at least 3, because quantization_type is asymmetric",
                    'binary (1) and ternary (2) weights are symmetric: set quantization_type to "symmetric"',
                )

    def _of_format(self, name: str, params: WeightQuantizationParams) -> Iterator[Conflict]:
        shared, where = self.shared_parameters, ("different_groups", name, "params")
        if params.format == "fp8_e5m2":
            yield Conflict(
                (*where, "format"),
                params.format,
                "fp8_e4m3 for weights: no server reads E5M2 weights, and they have a bit less",
                'set it to "fp8_e4m3"',
            )
        if params.format != INTEGERS and shared.quantization_type != "symmetric":
            yield Conflict(
                ("shared_parameters", "quantization_type"), shared.quantization_type, '"symmetric" for floats'
            )
        if params.earlier_formats and shared.has_given_scales:
            yield Conflict(
                (*where, "earlier_formats"),
                [stretch.format for stretch in params.earlier_formats],
                'nothing, unless scales are "dynamic": others are made for one format',
                'set scales to "dynamic"',
            )
        if params.earlier_formats and shared.fp16_mixed_quantize.enabled:
            yield Conflict((*where, "earlier_formats"), "a schedule", "nothing beside fp16_mixed_quantize")
        if params.format == INTEGERS and self.shared_parameters.granularity_of(params) == "per_block":
            yield Conflict(
                (*where, "granularity"), "per_block", "another one for integers: no format stores it"
            )

    def _of_thresholds(self) -> Iterator[Conflict]:
        """What binary and ternary codes, which come from a sign and a threshold, know nothing of."""
        shared = self.shared_parameters
        bits = [group.params.first_bits for group in self.different_groups.values()]
        none_is_rounded = bool(bits) and max(bits) < _FEWEST_BITS_OF_A_GRID and not shared.has_given_scales
        path, needed = ("shared_parameters",), f"a group has at least {_FEWEST_BITS_OF_A_GRID} bits"
        yield from without_effect(shared, "narrow_range", none_is_rounded, needed, path)
        if shared.rounding == "stochastic":
            yield from without_effect(shared, "rounding", none_is_rounded, needed, path)

    @property
    def insists_on_native(self) -> str | None:
        return "shared_parameters.quantizer_kernel" if self.shared_parameters.quantizer_kernel else None

    def describe_settings(self) -> str:
        shared = self.shared_parameters
        clips = shared.quantize_weight_in_forward or shared.has_given_scales
        gradient = "straight-through gradient" + (", zero where it clips" if clips else "")
        grid = "narrow grid" if shared.effective_narrow_range else "legacy grid"
        if shared.quantization_type == "asymmetric" and shared.narrow_range is None and "legacy" in grid:
            grid += ", narrow for pruned weights"
        rounding = f"{shared.rounding} rounding"
        facts = [f"fake quantization in forward, {gradient}"]
        if any(group.params.format == INTEGERS for group in self.different_groups.values()):
            facts = [shared.quantization_type, rounding, grid, *facts]
        if shared.has_given_scales:
            facts.append(f"{shared.effective_scales} scales")
        if shared.train == "scales":
            facts.append("nothing else trains")
        if shared.fp16_mixed_quantize.enabled:
            facts.append(f"faded in by {shared.fp16_mixed_quantize.quantize_change_ratio:g} per step")
        return ", ".join(facts)

    def describe_target(self, target: Target) -> str:
        params, shared = target.params, self.shared_parameters
        first = f"{params.start_bits} -> " if params.first_bits != params.final_bits else ""
        when = steps(shared.schedule_offset, params.last_drop(shared.schedule_offset))
        what = described(params, f"{first}{params.final_bits} bits")
        return f"{what}, {self._granularity_of(target)}, {when}"

    def _granularity_of(self, target: Target) -> str:
        shared = self.shared_parameters
        granularity, size = shared.granularity_of(target.params), shared.group_size_of(target.params)
        if granularity == "per_column_group":
            return f"per {size} columns"
        if granularity == "per_block":
            return f"per {size} x {size}"
        if granularity not in (None, "per_group"):
            return str(granularity)
        if target.kind is ModuleKind.EMBEDDING:
            return "per row"
        return plural(shared.quantize_groups, "group")

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        shared = self.shared_parameters
        for group, settings in self.different_groups.items():
            last = settings.params.last_drop(shared.schedule_offset)
            if settings.params.earlier_formats:
                keys: tuple[str, ...] = ("different_groups", group, "params", "earlier_formats")
                yield ScheduleEnd(keys, settings.params.warm_up, last)
            elif settings.params.first_bits != settings.params.final_bits:
                keys = ("different_groups", group, "params", "quantization_period")
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
        yield from float_limits.of_weights(self.key, self.shared_parameters, targets)

    def limits_beside(
        self, techniques: Mapping[str, TechniquePlan], shapes_after: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Problem]:
        yield from int8_limits.problems(techniques)
        yield from float_limits.of_fp8_products(techniques)
        yield from weight_limits.groups_that_a_cut_breaks(techniques[self.key], shapes_after)
        yield from weight_limits.grids_without_zero(techniques[self.key])
