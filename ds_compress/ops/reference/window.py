"""Scores against a window of keys: a threshold that is nearly known is found in one pass over the scores."""

from __future__ import annotations

import torch

from ds_compress.ops.checks import check_window
from ds_compress.ops.reference.mask import mask_pack, mask_unpack

_MAGNITUDE = 0x7FFFFFFF
_LARGEST_FINITE = 0x7F7FFFFF


@torch.no_grad()
def mask_window(
    scores: torch.Tensor,
    competing: torch.Tensor | None,
    low: int,
    high: int,
    magnitude: bool,
    capacity: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which scores lie above the window [low, high] of keys, and which inside.

    A key is the bit pattern of |score| where `magnitude` is true, else an int32 in the order of the signed scores; -0.0
    equals +0.0.

    Args:
        scores: fp32 (n,) contiguous, n < 2^31.
        competing: uint8 (at least ceil(n / 8),): the packed bits of those that take part; None: all.
        low, high: int32, low <= high.
        capacity: how many scores inside the window are returned at most.

    Returns:
        packed: uint8 (ceil(n / 8),), the bits of those above.
        keys, places: int32 (capacity,) each, of the first of those inside, in their order; then zeros.
        counts: int64 (3,): above, inside (may exceed `capacity`), NaN or Inf.

    >>> packed, keys, places, counts = F.mask_window(torch.tensor([3.0, -1.0, 0.5]), None, 0, 1 << 30, True, 2)
    >>> F.mask_unpack(packed, 3).tolist(), places.tolist(), counts.tolist()
    ([True, False, False], [1, 2], [1, 2, 0])
    """
    check_window(scores, competing, low, high, capacity)
    if magnitude:
        keys = scores.view(torch.int32) & _MAGNITUDE
    else:
        keys = (scores + 0.0).view(torch.int32)
        keys.bitwise_xor_((keys >> 31).bitwise_and_(_MAGNITUDE))
    above, inside = keys > high, (keys >= low) & (keys <= high)
    non_finite = (scores.view(torch.int32) & _MAGNITUDE) > _LARGEST_FINITE
    if competing is not None:
        takes_part = mask_unpack(competing, scores.numel())
        for mask in (above, inside, non_finite):
            mask.logical_and_(takes_part)
    counts = torch.stack([mask.count_nonzero() for mask in (above, inside, non_finite)])
    found = inside.nonzero().flatten()[:capacity]
    filled = (0, capacity - found.numel())
    places = torch.nn.functional.pad(found.int(), filled)
    return mask_pack(above), torch.nn.functional.pad(keys[found], filled), places, counts
