"""True division by a number, on every device."""

from __future__ import annotations

import torch


def divided(values: torch.Tensor, number: float) -> torch.Tensor:
    """`values / number`, correctly rounded.

    torch's CUDA kernel multiplies by the rounded reciprocal when the divisor is a Python number or a scalar on the
    CPU, which is another number in the last bit for one of four values; a divisor on the device it divides by.
    """
    if values.device.type == "cpu":
        return values / number
    return values / torch.full((), number, dtype=values.dtype, device=values.device)
