"""Bit-packed masks in plain torch: bit i of byte j belongs to element 8 j + i.

A cleared bit turns its element into +0.0 whatever it was, NaN and Inf included: the bit pattern is ANDed with
zeros, which a multiplication by zero would not do. The kernels give the same bits.
"""

from __future__ import annotations

import functools
import struct

import torch

from ds_compress.ops.checks import check_all_masked, check_bits, check_masked, check_n_of_m, check_tensor

_INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Multiplying eight 0/1 bytes (one int64) by this constant collects them, in order, in the top byte.
_COLLECT_BITS = 0x0102040810204080
# Elements expanded at a time: the scratch of one chunk (1 MiB for fp32) stays in a core's L2 cache.
_CHUNK = 1 << 18
# Up to here N:M ranks by comparing every pair of a group, which is many times faster than sorting tiny rows.
_LARGEST_GROUP_BY_PAIRS = 16
_LARGEST_KEY = 2**31 - 1


@torch.no_grad()
def mask_apply_(weights: torch.Tensor, packed: torch.Tensor, bit_offset: int = 0, fill: float = 0.0) -> None:
    """Sets the elements whose bit is cleared to `fill`, in place.

    Args:
        weights: (n,) contiguous, fp32, bf16, fp16 or fp64; element i belongs to bit `bit_offset + i`.
        packed: uint8 (at least ceil((bit_offset + n) / 8),) contiguous, on the same device.

    Raises:
        ValueError: for any other shape, dtype or device.

    >>> weights = torch.ones(3)
    >>> F.mask_apply_(weights, F.mask_pack(torch.tensor([True, False, True])))
    >>> weights
    tensor([1., 0., 1.])
    """
    check_masked("mask_apply_", weights, packed, bit_offset)
    patterns = weights.view(_INTEGER_OF_SIZE[weights.element_size()])
    kept = _bits(patterns.dtype, patterns.device)
    filled = None
    if struct.pack("d", fill) != bytes(8):  # -0.0 is a fill too
        pattern = torch.full((), fill, dtype=weights.dtype, device=weights.device).view(patterns.dtype)
        filled = ~kept & pattern
    for begin in range(0, patterns.numel(), _CHUNK):
        chunk = patterns[begin : begin + _CHUNK]
        octets = _octets(packed, bit_offset + begin, chunk.numel()).int()
        chunk.bitwise_and_(kept.index_select(0, octets).view(-1)[: chunk.numel()])
        if filled is not None:
            chunk.bitwise_or_(filled.index_select(0, octets).view(-1)[: chunk.numel()])


@torch.no_grad()
def mask_apply_many_(
    weights: list[torch.Tensor], packed: list[torch.Tensor], bit_offsets: list[int], fill: float = 0.0
) -> None:
    """`mask_apply_` of many tensors on one device, on CUDA in one launch for every 256 of a dtype.

    Args:
        weights, packed, bit_offsets: of one length; each three as in `mask_apply_`. No two weights share memory.

    >>> weights = [torch.ones(3), torch.ones(2)]
    >>> F.mask_apply_many_(weights, [F.mask_pack(torch.tensor([True, False, True]))] * 2, [0, 1])
    >>> weights
    [tensor([1., 0., 1.]), tensor([0., 1.])]
    """
    check_all_masked("mask_apply_many_", weights, packed, bit_offsets)
    for values, mask, bit_offset in zip(weights, packed, bit_offsets, strict=True):
        mask_apply_(values, mask, bit_offset, fill)


def mask_pack(mask: torch.Tensor) -> torch.Tensor:
    """Packs bool (n,) into uint8 (ceil(n / 8),); unused bits are zero.

    >>> F.mask_pack(torch.tensor([True, False, True]))
    tensor([5], dtype=torch.uint8)
    """
    check_tensor("mask_pack", "mask", mask, 1, (torch.bool,))
    numel = mask.numel()
    padded = -(-numel // 8) * 8
    if padded != numel or mask.storage_offset() % 8:
        mask = torch.nn.functional.pad(mask, (0, padded - numel)).clone()
    octets = mask.view(torch.int64)
    return ((octets * _COLLECT_BITS) >> 56).to(torch.uint8)


def mask_unpack(packed: torch.Tensor, numel: int, bit_offset: int = 0) -> torch.Tensor:
    """bool (numel,) of the bits from `bit_offset` on.

    >>> F.mask_unpack(torch.tensor([5], dtype=torch.uint8), 3)
    tensor([ True, False,  True])
    """
    check_bits("mask_unpack", packed, numel, bit_offset)
    octets = _octets(packed, bit_offset, numel).int()
    return _bits(torch.bool, packed.device).index_select(0, octets).view(-1)[:numel].clone()


def mask_n_of_m(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """The packed mask, uint8 (ceil(R C / 8),), that keeps the n largest of every m successive scores of a row.

    Args:
        scores: fp32 (R, C) contiguous. The last run of a row may be short. A NaN is the largest, a tie goes to
            the lower index, -0.0 equals +0.0.
        n, m: 0 <= n <= m, 1 <= m.

    >>> F.mask_unpack(F.mask_n_of_m(torch.tensor([[3.0, 1.0, 4.0, 1.0]]), 2, 4), 4)
    tensor([ True, False,  True, False])
    """
    check_n_of_m("mask_n_of_m", scores, n, m)
    rows, columns = scores.shape
    if scores.numel() == 0:
        return mask_pack(torch.zeros(0, dtype=torch.bool, device=scores.device))
    runs = -(-columns // m)
    patterns = (scores + 0.0).view(torch.int32)
    keys = patterns ^ ((patterns >> 31) & _LARGEST_KEY)
    keys.masked_fill_(scores.isnan(), _LARGEST_KEY)
    # The padding ranks below -Inf, and behind it.
    keys = torch.nn.functional.pad(keys, (0, runs * m - columns), value=-_LARGEST_KEY - 1)
    groups = keys.view(rows * runs, m)
    mask = _top_by_pairs(groups, n) if m <= _LARGEST_GROUP_BY_PAIRS else _top_by_sorting(groups, n)
    return mask_pack(mask.reshape(rows, runs * m)[:, :columns].reshape(-1))


def _top_by_pairs(groups: torch.Tensor, n: int) -> torch.Tensor:
    """bool like `groups` (runs, m): the n largest keys of each row, ties to the lower index."""
    columns = groups.t().contiguous()
    mask = torch.empty_like(columns, dtype=torch.bool)
    for j, mine in enumerate(columns):
        rank = torch.zeros_like(mine, dtype=torch.uint8)
        for k, other in enumerate(columns):
            if k != j:
                rank += (other >= mine) if k < j else (other > mine)
        mask[j] = rank < n
    return mask.t()


def _top_by_sorting(groups: torch.Tensor, n: int) -> torch.Tensor:
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, order[:, :n], True)


def _octets(packed: torch.Tensor, bit: int, count: int) -> torch.Tensor:
    """uint8 (ceil(count / 8),): the bits from `bit` on, moved to a byte boundary."""
    first, shift = divmod(bit, 8)
    octets = packed[first : first + -(-(shift + count) // 8)]
    if not shift:
        return octets
    following = torch.nn.functional.pad(octets[1:], (0, 1))
    return ((octets >> shift) | (following << (8 - shift)))[: -(-count // 8)]


@functools.lru_cache(maxsize=32)
def _bits(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(256, 8) table of the bits of each byte; as signed integers a set bit is -1, all ones."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    signed = dtype in (torch.int16, torch.int32, torch.int64)
    return (-bits if signed else bits).to(dtype).to(device)
