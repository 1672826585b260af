"""`activation_quantization`: how many bits the inputs of a layer get, and where their ranges come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

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
from ds_compress.config.targets import Target


class ActivationQuantizationParams(StrictModel):
    """`params` of one group."""

    bits: Annotated[StrictInt, Field(ge=4, le=8)] = Field(description="Bits of the layer's input, 4 to 8.")


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
    granularity: Literal["per_token", "per_tensor"] | None = Field(
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
    def effective_granularity(self) -> Literal["per_token", "per_tensor"]:
        """What shares a range: a static range is one for the whole input."""
        if self.range_calibration == "static":
            return "per_tensor"
        return self.granularity or "per_token"

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
        if self.given("range_momentum") and self.range_calibration == "dynamic":
            yield Conflict(
                ("range_momentum",),
                self.range_momentum,
                'nothing, unless range_calibration is "static"',
                'remove "range_momentum", or set range_calibration to "static"',
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

    def describe_settings(self) -> str:
        shared = self.shared_parameters
        grid = "narrow grid" if shared.effective_narrow_range else "legacy grid"
        ranges = f"{shared.range_calibration} ranges {shared.effective_granularity}"
        return ", ".join([shared.quantization_type, grid, ranges])

    def describe_target(self, target: Target) -> str:
        return f"{target.params.bits} bits, {steps(self.shared_parameters.schedule_offset)}"

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        offset = self.shared_parameters.schedule_offset
        yield ScheduleEnd(("shared_parameters", "schedule_offset"), offset, offset)
