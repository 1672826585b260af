"""Stochastic rounding of payloads: a gradient far below the scale of its block is sent as a whole scale now and then.

Rounding to nearest sends 0 for as long as it stays small, and a bias remains; here the mean of many payloads is the
gradient itself (Gupta et al. 2015, "Deep learning with limited numerical precision"), at the price of noise.

    q = floor(t / scale + u)        u in [0, 1), by counter: (bucket, payload of the bucket, position)

Every process draws the same u and adds rank / W to it, modulo 1: each rounds without bias, and where all have the same
gradient, the fraction of them that rounds up is its fractional part, so the noise of their mean is W times smaller.
"""

from __future__ import annotations

import torch

from ds_compress.ops.counter_rng import stream_key, uniform
from ds_compress.reduce.codec import BlockCodec

_QUANT_MAX = {8: 127, 4: 7}
_AT_A_TIME = 1 << 15
"""Elements that a CPU processes at a time, so that they stay in its cache."""


class Dither:
    """The random numbers of one process.

    Args:
        share: rank / W of the process.
    """

    def __init__(self, share: float = 0.0) -> None:
        self.share = share
        self.buckets = 0
        """Buckets begun so far: saved in checkpoints."""
        self._messages = 0

    def begin(self) -> None:
        """The next bucket."""
        self.buckets += 1
        self._messages = 0

    def draw(self, numel: int, device: torch.device) -> torch.Tensor:
        """fp32 (numel,) in [0, 1) for the next payload of this bucket."""
        self._messages += 1
        drawn = uniform(numel, stream_key(self.buckets, "message", self._messages), device=device)
        return drawn.add_(self.share).frac_()


class StochasticBlockCodec(BlockCodec):
    """`BlockCodec` that rounds by `dither`; its payloads are decoded as those of any other."""

    def __init__(self, bits: int, block: int, dither: Dither) -> None:
        super().__init__(bits, block)
        self._dither = dither

    def encode(self, x: torch.Tensor, payload: torch.Tensor, residual: torch.Tensor | None = None) -> None:
        super().encode(self._moved(x, residual), payload)

    def encode_rows(
        self, x: torch.Tensor, payloads: torch.Tensor, residual: torch.Tensor | None, shard: int
    ) -> None:
        super().encode_rows(self._moved(x, residual), payloads, None, shard)

    def sum_and_encode(
        self,
        payloads: torch.Tensor,
        payload: torch.Tensor,
        residual: torch.Tensor | None,
        numel: int,
        multiplier: float,
    ) -> None:
        total = torch.empty(numel, device=payloads.device)
        self.sum(payloads, total, multiplier)
        self.encode(total, payload, residual)

    def _moved(self, x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        """fp32 like x: x plus noise, with the same scales, so that rounding it to nearest rounds x stochastically."""
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
        """Replaces `noise` in [-1/2, 1/2) by x plus noise times the scale of x's blocks."""
        short = -x.numel() % self.block
        blocks = torch.nn.functional.pad(x.float(), (0, short)).view(-1, self.block)
        largest = blocks.abs().amax(1, keepdim=True)
        moved = torch.nn.functional.pad(noise, (0, short)).view(-1, self.block)
        moved.mul_(largest / _QUANT_MAX[self.bits]).add_(blocks).clamp_(-largest, largest)
        # The largest element is not changed, and no other exceeds it, because it determines the scale.
        noise.copy_(torch.where(blocks.abs() == largest, blocks, moved).view(-1)[: x.numel()])
