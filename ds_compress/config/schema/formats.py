"""The number formats as the JSON has them: what `params` of both quantization blocks say of them, and its rules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from ds_compress.config.schema.fields import Conflict, StrictInt, StrictModel
from ds_compress.quant.formats import FORMATS, NumberFormat

FormatName = Literal[
    "int", "fp8_e4m3", "fp8_e5m2", "mxfp8", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4", "nf4"
]
INTEGERS: Literal["int"] = "int"
BITS_OF_INTEGERS = 8
SQUARE = 128
"""Outputs and inputs of a block under per_block."""


class EarlierFormat(StrictModel):
    """One stretch of a schedule of formats, before the one that a layer ends with."""

    format: FormatName = Field(description="The format while this stretch lasts.")
    steps: Annotated[StrictInt, Field(ge=1)] = Field(description="Applied optimizer steps that it lasts.")
    bits: Annotated[StrictInt, Field(ge=3, le=8)] | None = Field(
        default=None, description='Bits where format is "int"; absent: 8.'
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.bits is not None and self.format != INTEGERS:
            yield Conflict(("bits",), self.bits, f"nothing: {self.format} fixes it", "remove it")


class FormatParams(StrictModel):
    """What the `params` of both quantization blocks have in common."""

    format: FormatName = Field(
        default=INTEGERS,
        description=(
            "The numbers that a value is rounded to. int: integers; fp8_*: 8-bit floats; mxfp*: OCP microscaling, a "
            "power of two for each 32 inputs; nvfp4: 4-bit floats, an E4M3 scale for each 16 inputs and one for the "
            "tensor; nf4: QLoRA's 4-bit quantiles, for weights."
        ),
    )
    earlier_formats: tuple[EarlierFormat, ...] = Field(
        default=(),
        description=(
            "Formats that come before this one from schedule_offset on, each for so many applied steps, e.g. "
            '[{"format": "fp8_e4m3", "steps": 100}].'
        ),
    )
    group_size: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="Neighbouring inputs that share a scale; absent: as the format or the block says.",
    )

    @property
    def number_format(self) -> NumberFormat | None:
        """None for integers."""
        return FORMATS.get(self.format)

    @property
    def warm_up(self) -> int:
        """Applied steps from schedule_offset until the last format."""
        return sum(stretch.steps for stretch in self.earlier_formats)

    def format_conflicts(self, bits_keys: Sequence[str]) -> Iterator[Conflict]:
        """What the format fixes and the JSON has as well; `bits_keys`: those that say how many bits integers have."""
        known = self.number_format
        if known is None:
            return
        for key in bits_keys:
            if self.given(key):
                yield Conflict(
                    (key,),
                    getattr(self, key),
                    f"nothing: {self.format} has {known.bits} bits",
                    f'remove "{key}"',
                )
        if known.block is not None and self.group_size not in (None, known.block) and known.name != "nf4":
            yield Conflict(
                ("group_size",),
                self.group_size,
                f"{known.block}, which {self.format} fixes",
                'remove "group_size"',
            )


def stretch_at(params: FormatParams, elapsed: int) -> tuple[EarlierFormat | None, int]:
    """The stretch `elapsed` applied steps after the schedule offset and where it began; None: the last format."""
    since = 0
    for stretch in params.earlier_formats:
        if elapsed < since + stretch.steps:
            return stretch, since
        since += stretch.steps
    return None, since


def described(params: Any, bits: str) -> str:
    """E.g. "fp8_e4m3 -> nvfp4" or "4 bits"; `bits`: what to say of integers."""
    names = [stretch.format for stretch in params.earlier_formats]
    names.append(bits if params.format == INTEGERS else params.format)
    return " -> ".join(names)
