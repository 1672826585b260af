"""`parameter_compression`: how many bits updated weights have on the wire between processes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ds_compress.config.schema.fields import StrictInt
from ds_compress.config.schema.gradient_compression import Wire


class ParameterCompression(Wire):
    """Sends the weights that a step changed (ZeRO stages 1 and 2) or that a layer needs (3) as int8 or int4 codes.

    At stages 1 and 2 the codes hold the difference between the new fp32 weights and the copies of the other
    processes, so an error is corrected by the next message; at stage 3, where nobody keeps a copy, the weights.
    """

    refresh_interval: Annotated[StrictInt, Field(ge=1)] = Field(
        default=100,
        description="Applied optimizer steps between two exact copies of the weights, at stages 1 and 2.",
    )
