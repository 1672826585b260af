"""`gradient_compression`: how many bits gradients have between processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from ds_compress.config.schema.block import Block, ScheduleEnd, steps
from ds_compress.config.schema.fields import (
    Choice,
    Conflict,
    Description,
    Step,
    StrictBool,
    StrictInt,
)
from ds_compress.ops.sizes import chunk_elements

BLOCK_OF_BITS = {8: 512, 4: 128}
"""Weights that share one scale: int4 needs small blocks, int8 loses nothing with larger ones."""
_LARGEST_BLOCK = 8192

Bits = Annotated[Literal[8, 4], Choice]
BlockSize = Annotated[
    StrictInt,
    Field(ge=32, le=_LARGEST_BLOCK, multiple_of=32),
    Description(f"a multiple of 32 up to {_LARGEST_BLOCK}"),
]
PieceElements = Annotated[StrictInt, Field(ge=1024)]
Rounding = Annotated[Literal["nearest", "stochastic"], Choice]
MinElements = Annotated[StrictInt, Field(ge=0)]


class QuantizedTransport(Block):
    """What the blocks that send quantized values between processes have in common."""

    uses_kernels = True

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    bits: Bits = Field(default=8, description="Bits of an element between processes: 8 or 4.")
    block_size: BlockSize | None = Field(
        default=None, description="Elements that share one fp32 scale; absent: 512 for 8 bits, 128 for 4."
    )
    piece_elements: PieceElements | None = Field(
        default=None,
        description=(
            "Elements that are sent together; while one chunk is sent the next is quantized. Absent: 1048576, and more "
            "for many processes, so that each gets 64 KiB from each other one at a time."
        ),
    )
    warmup_steps: Step = Field(
        default=0, description="Applied optimizer steps that are sent as DeepSpeed does."
    )
    min_elements: MinElements = Field(
        default=1 << 15,
        description="What has fewer elements is sent as DeepSpeed does: there, latency decides.",
    )
    measure_link: StrictBool = Field(
        default=True,
        description=(
            "Time both ways when a run begins and stay with DeepSpeed's where it is faster; checkpoints keep the "
            "verdict. false: always quantize."
        ),
    )

    @property
    def effective_block_size(self) -> int:
        """`block_size`, or what suits the bits."""
        return self.block_size or BLOCK_OF_BITS[self.bits]

    def chunk_elements(self, world_size: int) -> int:
        """`piece_elements`, or what suits so many processes."""
        return chunk_elements(self.piece_elements, world_size, self.bits)

    def schedule_ends(self) -> Iterator[ScheduleEnd]:
        yield ScheduleEnd(("warmup_steps",), self.warmup_steps, self.warmup_steps + 1)

    @property
    def when(self) -> str:
        return steps(self.warmup_steps)

    def _facts(self) -> Iterator[str]:
        yield f"{self.bits} bits in blocks of {self.effective_block_size}"
        if self.warmup_steps:
            yield steps(self.warmup_steps)
        if self.measure_link:
            yield "if the link is slow enough to gain"


class GradientCompressionConfig(QuantizedTransport):
    """Sends gradients between processes as int8 or int4 values with a scale per block, at every ZeRO stage."""

    key = "gradient_compression"

    rounding: Rounding = Field(
        default="nearest",
        description=(
            "nearest; or stochastic: gradients far below their block's step arrive without bias, with noise, where "
            "nearest makes 0 of them. Takes longer to encode."
        ),
    )
    error_feedback: StrictBool = Field(
        default=False,
        description=(
            "Add to each gradient what the last message lost, at a byte or two per parameter: small gradients beside "
            "large ones in a block are late instead of lost. Measured gains with SGD and coarse scales; with Adam and "
            "the default blocks none, and a little worse in int4."
        ),
    )
    error_feedback_bits: Annotated[Literal[8, 16], Choice] | None = Field(
        default=None, description="Bits in which the lost part is kept, per parameter: 8 or 16; absent: 8."
    )
    hierarchical: StrictBool = Field(
        default=False,
        description="Sum in full precision inside a host, and quantize only what leaves it.",
    )

    def conflicts(self) -> Iterator[Conflict]:
        if self.error_feedback and self.rounding == "stochastic":
            yield Conflict(
                ("rounding",),
                self.rounding,
                '"nearest" with error_feedback',
                "both keep what rounding loses: choose one",
            )
        if self.error_feedback_bits is not None and not self.error_feedback:
            yield Conflict(
                ("error_feedback_bits",),
                self.error_feedback_bits,
                "absent, because error_feedback is false",
                'remove it, or set "error_feedback" to true',
            )

    @property
    def effective_error_feedback_bits(self) -> int | None:
        """Bits of the residuals; None without error feedback."""
        return (self.error_feedback_bits or 8) if self.error_feedback else None

    def describe(self, plan: Any = None) -> str:
        facts = ["gradients", *self._facts()]
        if self.rounding == "stochastic":
            facts.append("stochastic rounding")
        if self.effective_error_feedback_bits:
            facts.append(f"error feedback in {self.effective_error_feedback_bits} bits")
        if self.hierarchical:
            facts.append("full precision inside a host")
        return ", ".join(facts)
