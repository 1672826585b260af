"""Stochastic rounding of messages: a gradient far below its block's step arrives as whole steps now and then.

Rounding to nearest makes 0 of it for as long as it stays small, and a bias remains; here the mean of many messages is
the gradient itself (Gupta et al. 2015, "Deep learning with limited numerical precision"), at the price of noise.

    code = floor(t / scale + u)        u in [0, 1), by counter: (bucket, message of the bucket, place)

Every process draws the same u and adds rank / W to it, modulo 1: each rounds without bias, and where all have the same
gradient, as many of them round up as its fraction says, so the noise of their mean is W times smaller.
"""

from __future__ import annotations

import torch

from ds_compress.ops.counter_rng import stream_key, uniform
from ds_compress.reduce.codec import BlockCodec

_LARGEST_CODE = {8: 127, 4: 7}
_AT_A_TIME = 1 << 15
"""Elements that a CPU works on at a time, so that they stay in its cache."""


class Dither:
    """The random numbers of one process.

    Args:
        share: rank / W of the process.
    """

    def __init__(self, share: float = 0.0) -> None:
        self.share = share
        self.buckets = 0
        """Buckets begun so far: what a checkpoint has to keep."""
        self._messages = 0

    def begin(self) -> None:
        """The next bucket."""
        self.buckets += 1
        self._messages = 0

    def draw(self, numel: int, device: torch.device) -> torch.Tensor:
        """fp32 (numel,) in [0, 1) for the next message of this bucket."""
        self._messages += 1
        drawn = uniform(numel, stream_key(self.buckets, "message", self._messages), device=device)
        return drawn.add_(self.share).frac_()


class StochasticBlockCodec(BlockCodec):
    """`BlockCodec` that rounds by `dither`; its messages are read as those of any other."""

    def __init__(self, bits: int, block: int, dither: Dither) -> None:
        super().__init__(bits, block)
        self._dither = dither

    def encode(self, x: torch.Tensor, message: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        super().encode(self._moved(x, residual), message)

    def quantize_rows(
        self, x: torch.Tensor, messages: torch.Tensor, residual: torch.Tensor | None, chunk: int
    ) -> None:
        super().quantize_rows(self._moved(x, residual), messages, None, chunk)

    def sum_and_encode(
        self,
        messages: torch.Tensor,
        message: torch.Tensor,
        residual: torch.Tensor | None,
        numel: int,
        multiplier: float,
    ) -> None:
        total = torch.empty(numel, device=messages.device)
        self.sum(messages, total, multiplier)
        self.encode(total, message, residual)

    def _moved(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """fp32 like x: what rounded to nearest gives the codes of x, and the same scales."""
        if residual is not None:
            raise ValueError("stochastic rounding has no bias that a residual could make up for")
        moved = self._dither.draw(x.numel(), x.device).sub_(0.5)
        step = x.numel() or 1
        if x.device.type == "cpu":
            step = max(1, _AT_A_TIME // self.block) * self.block
        for noise, values in zip(moved.split(step), x.split(step), strict=True):
            self._move(noise, values)
        return moved

    def _move(self, noise: torch.Tensor, x: torch.Tensor) -> None:
        """Replaces `noise` in [-1/2, 1/2) by x and as many steps of x's blocks."""
        short = -x.numel() % self.block
        blocks = torch.nn.functional.pad(x.float(), (0, short)).view(-1, self.block)
        largest = blocks.abs().amax(1, keepdim=True)
        moved = torch.nn.functional.pad(noise, (0, short)).view(-1, self.block)
        moved.mul_(largest / _LARGEST_CODE[self.bits]).add_(blocks).clamp_(-largest, largest)
        # The largest stays, and nobody outgrows it, for it makes the scale; its code is the last one anyway.
        noise.copy_(torch.where(blocks.abs() == largest, blocks, moved).view(-1)[: x.numel()])
