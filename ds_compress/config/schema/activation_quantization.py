"""`activation_quantization`: how many bits the inputs of a layer get, and where their ranges come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.schema import expert_limits, float_limits
from ds_compress.config.schema.block import ScheduleEnd, WeightBlock, steps
from ds_compress.config.schema.fields import (
    Conflict,
    ExcludedModules,
    Group,
    Groups,
    Step,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictModel,
)
from ds_compress.config.schema.formats import INTEGERS, SQUARE, FormatParams, described
from ds_compress.config.targets import Target, TechniquePlan
from ds_compress.errors import Problem

Granularity = Literal["per_token", "per_tensor", "per_token_group"]


class ActivationQuantizationParams(FormatParams):
    """`params` of one group."""

    bits: Annotated[StrictInt, Field(ge=4, le=8)] | None = Field(
        default=None, description="Bits of the layer's input as integers, 4 to 8. Of a float format: absent."
    )
    granularity: Granularity | None = Field(
        default=None,
        description="What shares a dynamic range in this group; absent: as the format or shared_parameters say.",
    )

    range_calibration: Literal["dynamic", "static"] | None = Field(
        default=None, description="Where ranges of this group come from; absent: as shared_parameters say."
    )

    @property
    def final_bits(self) -> int:
        """Of one quantized value."""
        known = self.number_format
        return known.bits if known is not None else self.bits or 8

    def conflicts(self) -> Iterator[Conflict]:
        yield from self.format_conflicts(("bits",))
        known = self.number_format
        if known is None and self.bits is None:
            yield Conflict(("bits",), None, "a whole number >= 4 and <= 8", "add it, or a float format")
        if self.format == "nf4":
            yield Conflict(
                ("format",), "nf4", "another format: nf4 is for weights", 'use "nvfp4" or "fp8_e4m3"'
            )
        fixed = known is not None and known.block is not None
        if fixed and self.granularity not in (None, "per_token_group"):
            yield Conflict(
                ("granularity",),
                self.granularity,
                f"nothing: {self.format} has a scale for each {known.block if known else ''} inputs",
                'remove "granularity"',
            )
        if self.group_size is not None and not fixed and self.granularity != "per_token_group":
            yield Conflict(
                ("group_size",),
                self.group_size,
                'nothing, unless granularity is "per_token_group" in the same group',
                'add "granularity": "per_token_group", or remove "group_size"',
            )
        if any(stretch.format == "nf4" for stretch in self.earlier_formats):
            yield Conflict(("earlier_formats",), "nf4", "another format: nf4 is for weights")


class ActivationQuantizationGroup(Group):
    """Layers whose inputs get the same number of bits."""

    params: ActivationQuantizationParams = Field(description="What differs between groups.")


class ActivationQuantizationShared(StrictModel):
    """What holds for all groups of `activation_quantization`."""

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    quantization_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description="Whether the grid is centred on zero."
    )
    range_calibration: Literal["dynamic", "static"] = Field(
        default="dynamic",
        description="dynamic: a range for each input; static: a running mean of min and max.",
    )
    schedule_offset: Step = Field(
        default=0, description="Applied optimizer steps before inputs are quantized."
    )
    granularity: Granularity | None = Field(
        default=None, description="What shares a dynamic range; absent: per_token (for images: per image)."
    )
    narrow_range: StrictBool | None = Field(
        default=None, description="true: the grid reaches +max and -max; absent: false, the legacy grid."
    )
    range_momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Share of the old range that a static range keeps at each forward pass."
    )
    excluded_modules: ExcludedModules = ()

    @property
    def effective_granularity(self) -> Granularity:
        """What shares a range: a static range is one for the whole input."""
        if self.range_calibration == "static":
            return "per_tensor"
        return self.granularity or "per_token"

    def calibration_of(self, params: ActivationQuantizationParams) -> Literal["dynamic", "static"]:
        """Where the ranges of a group come from."""
        return params.range_calibration or self.range_calibration

    def granularity_of(self, params: ActivationQuantizationParams) -> Granularity:
        """What shares a range in a group."""
        known = params.number_format
        if known is not None and known.block is not None:
            return "per_token_group"
        if self.calibration_of(params) == "static":
            return "per_tensor"
        return params.granularity or self.granularity or "per_token"

    def group_size_of(self, params: ActivationQuantizationParams) -> int:
        """Neighbouring inputs that share a range under per_token_group."""
        known = params.number_format
        return params.group_size or (known.block if known is not None and known.block else SQUARE)

    def observes(self, params: ActivationQuantizationParams) -> bool:
        """Whether a range is observed in training: of static ranges, and for the global scale of nvfp4."""
        known = params.number_format
        return self.calibration_of(params) == "static" or (known is not None and known.has_global_scale)

    @property
    def effective_narrow_range(self) -> bool:
        """`narrow_range`, or the legacy grid."""
        return bool(self.narrow_range)

    def conflicts(self) -> Iterator[Conflict]:
        if self.granularity is not None and self.range_calibration == "static":
            yield Conflict(
                ("granularity",),
                self.granularity,
                "nothing, because a static range is one for the whole input",
                'remove "granularity", or set range_calibration to "dynamic"',
            )


class ActivationQuantizationConfig(WeightBlock):
    """Trains a model so that it survives layer inputs with few bits."""

    key = "activation_quantization"
    uses_kernels = True
    is_in_forward = True
    claims_inputs = True
    column = "inputs"

    shared_parameters: ActivationQuantizationShared = Field(
        default_factory=ActivationQuantizationShared, description="What holds for all groups."
    )
    different_groups: Groups[ActivationQuantizationGroup] = Field(default_factory=dict)

    def conflicts(self) -> Iterator[Conflict]:
        if self.shared_parameters.enabled and not self.different_groups:
            yield Conflict(
                ("different_groups",),
                None if not self.given("different_groups") else {},
                "at least one group with bits",
                'for every layer in 8 bits: {"all": {"params": {"bits": 8}}}',
            )
        shared = self.shared_parameters
        groups = self.different_groups.items()
        if shared.given("range_momentum") and not any(shared.observes(group.params) for _, group in groups):
            yield Conflict(
                ("shared_parameters", "range_momentum"),
                shared.range_momentum,
                'nothing, unless range_calibration is "static"',
                'remove "range_momentum", or set range_calibration to "static"',
            )
        for name, group in groups:
            yield from self._of_format(name, group.params)

    def _of_format(self, name: str, params: ActivationQuantizationParams) -> Iterator[Conflict]:
        shared, known = self.shared_parameters, params.number_format
        where = ("different_groups", name, "params")
        if known is not None and shared.quantization_type != "symmetric":
            yield Conflict(
                ("shared_parameters", "quantization_type"), shared.quantization_type, '"symmetric" for floats'
            )
        has_block_scales = known is not None and known.block is not None and not known.has_global_scale
        if has_block_scales and shared.calibration_of(params) == "static":
            yield Conflict(
                (*where, "format"),
                params.format,
                'one without block scales where range_calibration is "static": those are always dynamic',
                'set range_calibration to "dynamic"',
            )
        if shared.calibration_of(params) == "static" and params.granularity in (
            "per_token",
            "per_token_group",
        ):
            yield Conflict(
                (*where, "granularity"),
                params.granularity,
                "nothing, because a static range is one for the whole input",
                'remove "granularity", or set range_calibration to "dynamic"',
            )

    def describe_settings(self) -> str:
        shared = self.shared_parameters
        grid = "narrow grid" if shared.effective_narrow_range else "legacy grid"
        kinds = {shared.calibration_of(group.params) for group in self.groups.values()}
        calibrations = " and ".join(sorted(kinds))
        if all(group.params.format != INTEGERS for group in self.different_groups.values()):
            return f"{calibrations} scales"
        ranges = f"{calibrations} ranges {shared.effective_granularity}"
        return ", ".join([shared.quantization_type, grid, ranges])

    def planned(self, plan: TechniquePlan) -> dict[str, float]:
        return {"mean_bits": sum(t.params.final_bits for t in plan.targets) / max(1, len(plan.targets))}

    def describe_target(self, target: Target) -> str:
        what = described(target.params, f"{target.params.final_bits} bits")
        return f"{what}, {steps(self.shared_parameters.schedule_offset)}"

    def limits(self, targets: Sequence[Target]) -> Iterator[Problem]:
        yield from float_limits.of_inputs(self.key, self.shared_parameters, targets)
        yield from expert_limits.implementations(self.key, targets)

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        offset = self.shared_parameters.schedule_offset
        for name, group in self.different_groups.items():
            if group.params.earlier_formats:
                keys = ("different_groups", name, "params", "earlier_formats")
                yield ScheduleEnd(keys, group.params.warm_up, offset + group.params.warm_up)
        yield ScheduleEnd(("shared_parameters", "schedule_offset"), offset, offset)
