"""Sums of squares under a packed mask: two norms of a gradient in one pass that writes nothing."""

from __future__ import annotations

import torch

from ds_compress.ops.checks import check_square_sums
from ds_compress.ops.reference.mask import mask_unpack

_CHUNK = 1 << 18


@torch.no_grad()
def mask_square_sums(values: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    """fp64 (2,): the sum of the squares of all values, and of those whose bit is set.

    Squares and sums are fp64; implementations differ in the order of the sums alone. A NaN or Inf counts in the first
    sum, and in the second where its bit is set.

    Args:
        values: (n,) contiguous, fp32, bf16 or fp16.
        packed: uint8 (at least ceil(n / 8),) contiguous, on the same device; None: all bits are set.

    >>> F.mask_square_sums(torch.tensor([1.0, 2.0, 3.0]), F.mask_pack(torch.tensor([True, False, True])))
    tensor([14., 10.], dtype=torch.float64)
    """
    check_square_sums(values, packed)
    total = values.new_zeros(2, dtype=torch.float64)
    for begin in range(0, values.numel(), _CHUNK):
        squares = values[begin : begin + _CHUNK].double().square_()
        of_all = squares.sum()
        if packed is not None:
            squares.masked_fill_(~mask_unpack(packed[begin // 8 :], squares.numel()), 0.0)
        total += torch.stack([of_all, squares.sum()])
    return total
