"""`kv_cache`: the numbers that keys and values are kept in while a language model generates."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ds_compress.config.schema.block import Block, steps
from ds_compress.config.schema.fields import Step, StrictBool, StrictFloat

FORMATS_OF_A_CACHE = {"fp8": "fp8_e4m3"}
"""Names of the JSON -> `quant.formats`."""


class KvCacheConfig(Block):
    """Trains a decoder on keys and values as a server's FP8 cache will hold them, and stores their scales."""

    key = "kv_cache"
    uses_kernels = True
    is_in_forward = True

    enabled: StrictBool = Field(default=False, description="Whether this block does anything.")
    format: Literal["fp8"] = Field(
        default="fp8", description="fp8: E4M3, one scale for the keys and one for the values of each layer."
    )
    schedule_offset: Step = Field(
        default=0, description="Applied optimizer steps before keys and values are quantized."
    )
    range_momentum: Annotated[StrictFloat, Field(ge=0, lt=1)] = Field(
        default=0.95, description="Share of the old range that a new one keeps at each applied step."
    )

    def describe(self, plan: Any = None) -> str:
        return f"keys and values in {self.format}, static scales, {steps(self.schedule_offset)}"


def _in_full(value: Any) -> Any:
    """The word alone means the block, enabled."""
    return {"enabled": True, "format": value} if isinstance(value, str) else value


def takes_the_word_too(schema: dict[str, Any]) -> None:
    """The JSON schema of the key: the format alone, or the object."""
    schema["anyOf"].insert(0, {"type": "string", "enum": list(FORMATS_OF_A_CACHE)})


KvCache = Annotated[KvCacheConfig | None, BeforeValidator(_in_full)]
