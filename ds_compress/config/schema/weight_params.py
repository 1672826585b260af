"""`params` of a group of `weight_quantization`: what a weight is rounded to in the end, and what comes before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ds_compress.config.schema.fields import Conflict, Group, Step, StrictInt
from ds_compress.config.schema.formats import INTEGERS, FormatParams

Granularity = Literal["per_tensor", "per_group", "per_channel", "per_column_group", "per_block"]


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
