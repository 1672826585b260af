"""A mask of one bit per weight, applied in place at the speed of memory.

Bit i of byte j belongs to element 8*j + i. A cleared bit turns its weight into +0.0 whatever it was, NaN and
Inf included: the weight's bit pattern is ANDed with zeros, which multiplication by zero would not do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ds_compress.ops import kernels


def pack(mask: torch.Tensor) -> torch.Tensor:
    """Packs a bool tensor of shape (n,) into uint8 of shape (ceil(n/8),); unused bits are zero."""
    return kernels().mask_pack(mask.contiguous())


def unpack(packed: torch.Tensor, numel: int) -> torch.Tensor:
    """The bool tensor of shape (numel,) that `pack` was given."""
    return kernels().mask_unpack(packed, numel)


def window(
    scores: torch.Tensor, competing: torch.Tensor | None, low: int, high: int, magnitude: bool, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mask_window` of the kernels: the packed bits of scores above a window of keys, and what lies inside."""
    packed, keys, places, counts = kernels().mask_window(scores, competing, low, high, magnitude, capacity)
    return packed, keys, places, counts


def square_sums(values: torch.Tensor, packed: torch.Tensor | None) -> torch.Tensor:
    """fp64 (2,): the sum of all squares, and of those whose bit is set (all without a mask)."""
    sums: torch.Tensor = kernels().mask_square_sums(values, packed)
    return sums


@torch.no_grad()
def set_bits_(packed: torch.Tensor, places: torch.Tensor) -> None:
    """Sets the bits of these elements, int32 (n,), none of which is set or occurs twice."""
    packed.index_add_(0, places >> 3, (1 << (places & 7)).to(torch.uint8))


@torch.no_grad()
def apply_(weights: torch.Tensor, packed: torch.Tensor, fill: float = 0.0) -> None:
    """Sets the weights whose bit is cleared to `fill`, in place.

    Args:
        weights: flat contiguous tensor of shape (n,), any floating dtype of 2, 4 or 8 bytes.
        packed: uint8 of shape (ceil(n/8),) on the same device.
    """
    kernels().mask_apply_(weights, packed, 0, fill)


@torch.no_grad()
def apply_many_(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """`apply_` of (weights, packed) pairs with zeros, in one call for each device."""
    by_device: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for weights, packed in pairs:
        tensors, masks = by_device.setdefault(weights.device, ([], []))
        tensors.append(weights)
        masks.append(packed)
    for tensors, masks in by_device.values():
        kernels().mask_apply_many_(tensors, masks, [0] * len(tensors))
