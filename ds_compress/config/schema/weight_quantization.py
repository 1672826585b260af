"""`weight_quantization`: what numbers a weight is rounded to, with which scales, and when."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field

from ds_compress.config.schema import (
    float_limits,
    int8_limits,
    packing_limits,
    stored_bytes,
    weight_limits,
)
from ds_compress.config.schema.block import LAYERS, ScheduleEnd, WeightBlock, WeightSize, plural, steps
from ds_compress.config.schema.fields import Conflict, Groups, without_effect
from ds_compress.config.schema.formats import INTEGERS, described
from ds_compress.config.schema.weight_params import WeightQuantizationGroup, WeightQuantizationParams
from ds_compress.config.schema.weight_sharing import WeightQuantizationShared
from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.errors import Problem
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.packed_weight import BITS as BITS_OF_PACKED

_FEWEST_BITS_OF_A_GRID = 3


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
        changes = params.earlier_formats or params.first_bits != params.final_bits
        if shared.frozen_weights == "packed" and (changes or params.final_bits not in BITS_OF_PACKED):
            yield Conflict(
                where,
                described(params, f"{params.first_bits} -> {params.final_bits} bits"),
                'one format of 4 or 8 bits from the first step on, because frozen_weights is "packed"',
                'set frozen_weights to "full"',
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
        params = [group.params for group in self.different_groups.values()]
        named = shared.narrow_range is None and all(each.granularity is not None for each in params)
        grid = "narrow grid" if shared.effective_narrow_range or named else "legacy grid"
        if shared.quantization_type == "asymmetric" and shared.narrow_range is None and "legacy" in grid:
            grid += ", narrow for pruned weights"
        rounding = f"{shared.rounding} rounding"
        facts = [f"fake quantization in forward, {gradient}"]
        if any(each.format == INTEGERS for each in params):
            facts = [shared.quantization_type, rounding, grid, *facts]
        if shared.has_given_scales:
            facts.append(f"{shared.effective_scales} scales")
        if shared.backward == "int8":
            facts.append("gradients of inputs by int8 products")
        if shared.train == "scales":
            facts.append("nothing else trains")
        if shared.fp16_mixed_quantize.enabled:
            facts.append(f"faded in by {shared.fp16_mixed_quantize.quantize_change_ratio:g} per step")
        return ", ".join(facts)

    def planned(self, plan: TechniquePlan) -> dict[str, float]:
        sizes = [(math.prod(t.shape), t.params.final_bits) for t in plan.targets]
        return {"mean_bits": sum(n * bits for n, bits in sizes) / max(1, sum(n for n, _ in sizes))}

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
        yield from packing_limits.problems(self.key, self.shared_parameters, targets)

    def limits_beside(
        self, techniques: Mapping[str, TechniquePlan], shapes_after: Mapping[str, tuple[int, ...]]
    ) -> Iterator[Problem]:
        yield from int8_limits.problems(techniques)
        yield from float_limits.of_fp8_products(techniques)
        yield from weight_limits.groups_that_a_cut_breaks(techniques[self.key], shapes_after)
        yield from weight_limits.given_scales_that_a_cut_breaks(techniques[self.key], shapes_after)
        yield from weight_limits.grids_without_zero(techniques[self.key])
