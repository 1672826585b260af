"""`parameter_compression`: how many bits updated weights have between processes."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ds_compress.config.schema.block import plural
from ds_compress.config.schema.fields import StrictInt
from ds_compress.config.schema.gradient_compression import QuantizedTransport


class ParameterCompressionConfig(QuantizedTransport):
    """Sends the weights that a step changed (ZeRO stages 1 and 2) or that a layer needs (3) as int8 or int4 values.

    At stages 1 and 2 the values are the difference between the new fp32 weights and the copies of the other
    processes, so an error is corrected by the next payload; at stage 3, where nobody keeps a copy, the weights.
    """

    key = "parameter_compression"

    refresh_interval: Annotated[StrictInt, Field(ge=1)] = Field(
        default=100,
        description="Applied optimizer steps between two exact copies of the weights, at stages 1 and 2.",
    )

    def describe(self, plan: Any = None) -> str:
        exact = f"exact every {plural(self.refresh_interval, 'step')}"
        return ", ".join(["weights", *self._facts(), exact])
