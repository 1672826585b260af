"""Fake quantization of the rows of a matrix, with the formulas of `ds_compress.quant.grid`, in plain torch."""

from __future__ import annotations

import math

import torch

from ds_compress.ops.checks import check_fake_quantize
from ds_compress.ops.reference.division import divided
from ds_compress.ops.reference.mask import mask_pack

SMALLEST_SCALE = 2.0**-126  # the least normal fp32: below it x / scale loses its digits
SHRINK = 0.25
"""What extreme rows are multiplied by, exactly: then no difference and no product with the scale overflows."""
# Elements worked on at a time, so that the fp32 copies of a chunk stay in cache.
_CHUNK_OF_A_DEVICE = 1 << 24
_CHUNK = 1 << 17


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    quant_min: int,
    quant_max: int,
    steps: int,
    symmetric: bool,
    with_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = q * scale (+ offset) with q = clamp(round((x - offset) / scale), quant_min, quant_max), row by row.

    Chosen from x, the scale of a row is max|x| / steps (symmetric) or (max - min) / steps, at least 2^-126, and the
    offset is round(min / scale) * scale, or min itself where all values are equal. fp32 arithmetic, cast last.

    Args:
        x: (R, C) contiguous, fp32, bf16 or fp16.
        scale, offset: given, fp32 (R,) or (1,); without a scale both are chosen from x. An asymmetric range
            has both or none, a symmetric one has no offset.
        quant_min, quant_max, steps: -128 <= quant_min <= quant_max <= 255, steps >= 1.
        with_mask: whether the mask of what is not clipped is wanted.

    Returns:
        y like x; the scale and the offset used, fp32 (R,) or as given (offset empty when symmetric); the mask
        quant_min <= round(normalized) <= quant_max, uint8 (ceil(R C / 8),), bit i of byte j for flat element 8 j + i,
        empty unless `with_mask`.

    A row with a NaN or an Inf has scale NaN, and everything in it is NaN. With a given scale Inf saturates and
    a NaN stays its own. Nothing finite becomes Inf or NaN: rows near the end of the range are worked on at a quarter of
    their size (see `is_extreme`), and what their scale puts beyond the dtype's largest value ends there.

    Raises:
        ValueError: for any other shape, dtype or device.

    >>> x = torch.tensor([[-1.0, 0.2, 0.6]])
    >>> y, scale, _, _ = F.fake_quantize(x, quant_min=-2, quant_max=2, steps=2, symmetric=True, with_mask=False)
    >>> y, scale
    (tensor([[-1.0000,  0.0000,  0.5000]]), tensor([0.5000]))
    """
    check_fake_quantize(x, scale, offset, quant_min, quant_max, steps, symmetric)
    rows, columns = x.shape
    y = torch.empty_like(x)
    nothing = x.new_empty(0, dtype=torch.float32)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if with_mask else None
    used_scale, used_offset = scale, offset
    if scale is None:
        used_scale, used_offset = _choose_qparams(x, steps, symmetric)
    assert used_scale is not None
    height = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_OF_A_DEVICE) // max(1, columns))
    for begin in range(0, rows, height):
        part = slice(begin, begin + height)
        row_scale = _of_rows(used_scale, part)
        row_offset = None if used_offset is None else _of_rows(used_offset, part)
        exact = x[part].float()
        extreme = is_extreme(row_scale, row_offset, torch.finfo(x.dtype).max)
        # On a GPU the question would wait for all that runs before, and tracing cannot answer it.
        ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
        shrink = None if ask and not bool(extreme.any()) else torch.where(extreme, SHRINK, 1.0)
        if shrink is not None:
            exact, row_scale = exact * shrink, row_scale * shrink
            row_offset = None if row_offset is None else row_offset * shrink
        if row_offset is not None:
            quantized = (exact - row_offset).div_(row_scale).round_()
        else:
            quantized = (exact / row_scale).round_()
        if mask is not None:
            mask[part] = (quantized >= quant_min) & (quantized <= quant_max)
        quantized.clamp_(quant_min, quant_max).mul_(row_scale)
        if row_offset is not None:
            quantized.add_(row_offset)
        if shrink is not None:
            limit = torch.finfo(x.dtype).max * shrink
            quantized = torch.where(extreme, quantized.clamp(-limit, limit) / shrink, quantized)
        y[part] = quantized
    bits = mask_pack(mask.view(-1)) if mask is not None else x.new_empty(0, dtype=torch.uint8)
    return (
        y,
        used_scale.clone() if scale is not None else used_scale,
        nothing if used_offset is None else used_offset.clone(),
        bits,
    )


def _choose_qparams(x: torch.Tensor, steps: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if x.shape[1] == 0:
        lowest = highest = torch.zeros(x.shape[0], dtype=torch.float32, device=x.device)
    else:
        # Adding zero makes one of the two zeros.
        lowest, highest = x.amin(1).float() + 0.0, x.amax(1).float()
    if symmetric:
        return _nan_unless_finite(
            divided(torch.maximum(highest, -lowest), steps).clamp_min_(SMALLEST_SCALE)
        ), None
    scale, offset = asymmetric_range(lowest, highest, steps)
    return _nan_unless_finite(scale), torch.where(scale.isfinite(), offset, math.nan)


def asymmetric_range(
    lowest: torch.Tensor, highest: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scale, offset) of groups from `lowest` to `highest`, fp32 or fp64 of one shape; see `quant.grid`."""
    width = divided(highest - lowest, steps)
    # Where max - min overflows, both count a quarter.
    shrunk = divided(highest * SHRINK - lowest * SHRINK, steps).div_(SHRINK)
    width = torch.where(width.isfinite(), width, shrunk)
    scale = width.clamp_min(SMALLEST_SCALE)
    largest = torch.finfo(scale.dtype).max
    offset = torch.round(lowest / scale).mul_(scale).clamp_(-largest, largest)
    return scale, torch.where(width < SMALLEST_SCALE, lowest, offset)


def is_extreme(scale: torch.Tensor, offset: torch.Tensor | None, limit: float) -> torch.Tensor:
    """Whether values of a group may overflow on the way to their quantized value or back, or end beyond `limit`."""
    reach = scale * 512
    return (reach if offset is None else reach + offset.abs()) >= limit


def _nan_unless_finite(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.isfinite(), scale, math.nan)


def _of_rows(values: torch.Tensor, part: slice) -> torch.Tensor:
    return values if values.numel() == 1 else values[part, None]


__all__ = ["SHRINK", "SMALLEST_SCALE", "asymmetric_range", "fake_quantize", "is_extreme"]
