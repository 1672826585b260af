"""A keep-mask of one bit per weight, applied in place at nearly the speed of a copy.

Bit i of byte j belongs to element 8*j + i. A cleared bit turns its weight into +0.0 whatever it was, NaN and
Inf included: the weight's bit pattern is ANDed with zeros, which multiplication by zero would not do.
"""

from __future__ import annotations

import functools

import torch

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplying eight 0/1 bytes (one int64) by this constant collects them, in order, in the top byte.
_COLLECT_BITS = 0x0102040810204080
# Elements expanded at a time: the scratch of one chunk (1 MiB for fp32) stays in a core's L2 cache.
_CHUNK = 1 << 18


def packed_numel(numel: int) -> int:
    """Bytes of the mask of `numel` weights."""
    return -(-numel // 8)


def pack(keep: torch.Tensor) -> torch.Tensor:
    """Packs a bool tensor of shape (n,) into uint8 of shape (ceil(n/8),); unused bits are zero."""
    numel = keep.numel()
    padded = packed_numel(numel) * 8
    if padded != numel:
        keep = torch.nn.functional.pad(keep, (0, padded - numel))
    octets = keep.contiguous().view(torch.int64)
    return ((octets * _COLLECT_BITS) >> 56).to(torch.uint8)


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The bool tensor of shape (numel,) that `pack` was given."""
    return _bits(torch.bool, packed.device).index_select(0, packed.int()).view(-1)[:numel]


@torch.no_grad()
def apply_(weights: torch.Tensor, packed: torch.Tensor, fill: float = 0.0) -> None:
    """Sets the weights whose bit is cleared to `fill`, in place.

    Args:
        weights: flat contiguous tensor of shape (n,), any floating dtype of 2, 4 or 8 bytes.
        packed: uint8 of shape (ceil(n/8),) on the same device.
    """
    patterns = weights.view(_INTEGER_OF_SIZE[weights.element_size()])
    kept = _bits(patterns.dtype, patterns.device)
    filled = None
    if fill != 0.0:
        pattern = torch.tensor(fill, dtype=weights.dtype, device=weights.device).view(patterns.dtype)
        filled = ~kept & pattern
    for begin in range(0, patterns.numel(), _CHUNK):
        chunk = patterns[begin : begin + _CHUNK]
        octets = packed[begin // 8 : packed_numel(begin + chunk.numel())].int()
        chunk.bitwise_and_(kept.index_select(0, octets).view(-1)[: chunk.numel()])
        if filled is not None:
            chunk.bitwise_or_(filled.index_select(0, octets).view(-1)[: chunk.numel()])


@functools.lru_cache(maxsize=32)
def _bits(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 8) table of the bits of each byte; as signed integers a set bit is -1, all ones."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    signed = dtype in (torch.int16, torch.int32, torch.int64)
    return (-bits if signed else bits).to(dtype).to(device)
