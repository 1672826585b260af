"""Random pruning by scores: Gumbel top-k, the same in every process, at every step and on every device.

To each log-score is added `temperature` times a number from the standard Gumbel distribution; then the largest are kept
as ever. That samples k units *without replacement*, each with a probability in proportion to score^(1 / temperature)
among those that are left: Yellott 1977 for one draw, Vieira 2014 and Kool, van Hoof & Welling 2019 ("Stochastic beams
and where to find them", section 2.3) for k. As the temperature goes to 0 it becomes the deterministic top-k, and as it
grows, a uniform choice. So many are kept as without noise, to the unit.

The noise is a pure function of (seed, name, index) by `ops.counter_rng`, and does not change with the step: it gives
each unit a constant random weight in the competition, so masks of a ramp stay nested where scores do not move. The
logarithm is made of exactly rounded operations on single elements, which do not depend on how a tensor is divided or
vectorized. A draw has 24 bits: none lies above 17.3.

A *secret* seed has 256 bits, which the operating system gives to process 0. Its commitment, a hash, may be published
before anybody knows the seed, and shows later that it was this one. The generator mixes well and is no cipher: who sees
scores and masks learns something of the noise, if not the seed.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ds_compress.ops import counter_rng

PRUNED = -1.0
"""A score so low or lower is that of a unit that is pruned and may not return."""

LOG_OF_ZERO = -4096.0
"""Below log-scores with any noise: those are above -400, and this is at most -2300 with it, at temperatures to 100."""

_LOWEST = torch.finfo(torch.float32).min
_TINY = torch.finfo(torch.float32).tiny
_SQRT_HALF_BITS = 0x3F3504F3
_LN_2 = 0.6931471805599453
_CHUNK = 1 << 15  # as counter_rng's
_CHUNK_OF_A_DEVICE = 1 << 23


class GumbelNoise:
    """The noise of one block of the JSON. seed: None for a secret one, which `draw` gets."""

    def __init__(self, block: str, temperature: float, seed: int | None) -> None:
        self.temperature = temperature
        self._block, self._seed, self._is_secret = block, seed, seed is None

    def draw(self, from_first_process: Callable[[Any], Any]) -> None:
        """Gets a secret seed unless there is one; a collective, by what gives everybody the value of process 0."""
        if self._seed is None:
            self._seed = int(from_first_process(secrets.token_hex(32)), 16)

    @property
    def secret_seed(self) -> str | None:
        """64 hexadecimal digits, for checkpoints only; None when it is not secret, or not drawn."""
        return f"{self._seed:064x}" if self._is_secret and self._seed is not None else None

    def restore(self, state: Mapping[str, Any]) -> None:
        """The secret of a checkpoint's state, if it has one."""
        stored = state.get("secret_seed")
        if self._is_secret and stored is not None:
            self._seed = int(stored, 16)

    def gumbel(self, name: str, start: int, numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """fp32 (numel,): the noise of the units from `start` on, before it is scaled."""
        if self._seed is None:
            raise RuntimeError("a secret seed is drawn first")
        key = counter_rng.stream_key(self._seed, f"gumbel\0{name}")
        survival = counter_rng.uniform(numel, key, start, device=device).neg_().add_(1.0)
        # -ln(-ln u), of u in (0, 1): the least exponential is half of the smallest step.
        return ln(ln(survival).neg_().clamp_min_(2.0**-25)).neg_()

    def perturbed(self, scores: torch.Tensor, name: str, start: int = 0) -> torch.Tensor:
        """fp32 (units,): log-scores with noise, of the units of `name` from `start` on; the order to select by.

        scores: fp32 (units,), not negative, or at most PRUNED: those stay below all others. Zeros, whose probability
        is 0, stay below all positive ones, in random order. NaN and Inf stay what they are.
        """
        out = torch.empty_like(scores)
        size = _CHUNK if scores.device.type == "cpu" else _CHUNK_OF_A_DEVICE
        for begin in range(0, scores.numel(), size):
            part = scores[begin : begin + size]
            noise = self.gumbel(name, start + begin, part.numel(), part.device).mul_(self.temperature)
            noisy = ln(part.clamp_min(_TINY)).masked_fill_(part <= 0, LOG_OF_ZERO).add_(noise)
            noisy.masked_fill_(part <= PRUNED, _LOWEST)
            out[begin : begin + size] = torch.where(part.isfinite(), noisy, part)
        return out


def ln(x: torch.Tensor) -> torch.Tensor:
    """Natural logarithm of positive normal fp32 numbers, to about one unit in the last place.

    Bit for bit the same for an element wherever it stands in a tensor: torch's own may take another way at its end.
    """
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS).bitwise_right_shift_(23)
    mantissa = (bits - (exponent << 23)).view(torch.float32)  # in [sqrt(1/2), sqrt(2))
    ratio = mantissa - 1.0
    ratio.div_(mantissa.add_(1.0))
    square = ratio * ratio
    series = (square * (1 / 9)).add_(1 / 7).mul_(square).add_(1 / 5).mul_(square).add_(1 / 3).mul_(square)
    fraction = series.add_(1.0).mul_(ratio.mul_(2.0))
    return exponent.to(torch.float32).mul_(_LN_2).add_(fraction)


def commitment(block: str, secret_seed: str) -> str:
    """What may be known of a secret seed before it is: "sha256:" and the hash of a domain string and the seed.

    >>> commitment("sparse_pruning", "00" * 32)[:20]
    'sha256:fcc8a77814f61'
    """
    text = f"ds_compress {block}.randomize.seed {secret_seed}"
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def commitments(secret_seeds: Mapping[str, str]) -> dict[str, str]:
    """{"<block>.randomize.seed": commitment} of {block: seed}."""
    return {f"{block}.randomize.seed": commitment(block, seed) for block, seed in secret_seeds.items()}
