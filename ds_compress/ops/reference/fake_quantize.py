"""Fake quantization of the rows of a matrix, with the formulas of `ds_compress.quant.grid`, in plain torch."""

from __future__ import annotations

import math

import torch

from ds_compress.ops.reference.division import divided
from ds_compress.ops.reference.mask import mask_pack

SMALLEST_SCALE = 2.0**-126  # the least normal fp32: below it x / scale loses its digits
SHRINK = 0.25
"""What extreme rows are multiplied by, exactly: then no difference of two values and no code times scale overflows."""
# Elements worked on at a time, so that the fp32 copies of a chunk stay in cache.
_CHUNK_OF_A_DEVICE = 1 << 24
_CHUNK = 1 << 17


def fake_quantize(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
    *,
    low: int,
    high: int,
    steps: int,
    symmetric: bool,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = code * scale (+ offset) with code = clamp(round((x - offset) / scale), low, high), row by row.

    Measured, the scale of a row is max|x| / steps (symmetric) or (max - min) / steps, at least 2^-126, and the
    offset is round(min / scale) * scale, or min itself where all values are equal. fp32 arithmetic, cast last.

    Args:
        x: (R, C) contiguous, fp32, bf16 or fp16.
        scale, offset: given ranges, fp32 (R,) or (1,); without a scale, ranges are measured. An asymmetric grid
            has both or none, a symmetric one has no offset.
        low, high, steps: -128 <= low <= high <= 255, steps >= 1.
        keep: whether the bits of `low <= round(normalized) <= high` are wanted.

    Returns:
        y like x; the scale and the offset used, fp32 (R,) or as given (offset empty when symmetric); kept, uint8
        (ceil(R C / 8),), bit i of byte j for flat element 8 j + i, empty unless `keep`.

    A measured row with a NaN or an Inf has scale NaN, and everything in it is NaN. With a given scale Inf saturates and
    a NaN stays its own. Nothing finite becomes Inf or NaN: rows near the end of the range are worked on at a quarter of
    their size (see `is_extreme`), and what their grid puts beyond the dtype's largest value ends there.

    Raises:
        ValueError: for any other shape, dtype or device.

    >>> x = torch.tensor([[-1.0, 0.2, 0.6]])
    >>> y, scale, _, _ = F.fake_quantize(x, low=-2, high=2, steps=2, symmetric=True, keep=False)
    >>> y, scale
    (tensor([[-1.0000,  0.0000,  0.5000]]), tensor([0.5000]))
    """
    _check(x, scale, offset, low, high, steps, symmetric)
    rows, columns = x.shape
    y = torch.empty_like(x)
    nothing = x.new_empty(0, dtype=torch.float32)
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device) if keep else None
    measured_scale, measured_offset = scale, offset
    if scale is None:
        measured_scale, measured_offset = _measure(x, steps, symmetric)
    assert measured_scale is not None
    height = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_OF_A_DEVICE) // max(1, columns))
    for begin in range(0, rows, height):
        part = slice(begin, begin + height)
        row_scale = _of_rows(measured_scale, part)
        row_offset = None if measured_offset is None else _of_rows(measured_offset, part)
        exact = x[part].float()
        extreme = is_extreme(row_scale, row_offset, torch.finfo(x.dtype).max)
        # On a GPU the question would wait for all that runs before.
        ask = x.device.type == "cpu"
        shrink = None if ask and not bool(extreme.any()) else torch.where(extreme, SHRINK, 1.0)
        if shrink is not None:
            exact, row_scale = exact * shrink, row_scale * shrink
            row_offset = None if row_offset is None else row_offset * shrink
        if row_offset is not None:
            codes = (exact - row_offset).div_(row_scale).round_()
        else:
            codes = (exact / row_scale).round_()
        if kept is not None:
            kept[part] = (codes >= low) & (codes <= high)
        codes.clamp_(low, high).mul_(row_scale)
        if row_offset is not None:
            codes.add_(row_offset)
        if shrink is not None:
            limit = torch.finfo(x.dtype).max * shrink
            codes = torch.where(extreme, codes.clamp(-limit, limit) / shrink, codes)
        y[part] = codes
    bits = mask_pack(kept.view(-1)) if kept is not None else x.new_empty(0, dtype=torch.uint8)
    return (
        y,
        measured_scale.clone() if scale is not None else measured_scale,
        nothing if measured_offset is None else measured_offset.clone(),
        bits,
    )


def _measure(x: torch.Tensor, steps: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    """Whether values of a group may overflow on the way to their code or back, or end beyond `limit`."""
    reach = scale * 512
    return (reach if offset is None else reach + offset.abs()) >= limit


def _nan_unless_finite(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.isfinite(), scale, math.nan)


def _of_rows(values: torch.Tensor, part: slice) -> torch.Tensor:
    return values if values.numel() == 1 else values[part, None]


def _check(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    offset: torch.Tensor | None,
    low: int,
    high: int,
    steps: int,
    symmetric: bool,
) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"fake_quantize: x is float32, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"fake_quantize: x is a contiguous matrix (R, C), got {tuple(x.shape)}")
    if not -128 <= low <= high <= 255 or steps < 1:
        raise ValueError(
            f"fake_quantize: -128 <= low <= high <= 255 and steps >= 1, got {low}, {high}, {steps}"
        )
    for name, values in (("scale", scale), ("offset", offset)):
        if values is None:
            continue
        if values.dtype is not torch.float32 or not values.is_contiguous() or values.device != x.device:
            raise ValueError(f"fake_quantize: {name} is contiguous float32 on {x.device}")
        if values.dim() != 1 or values.numel() not in (1, x.shape[0]):
            raise ValueError(f"fake_quantize: {name} is ({x.shape[0]},) or (1,), got {tuple(values.shape)}")
    if offset is not None and (symmetric or scale is None):
        raise ValueError("fake_quantize: an offset belongs to a given scale of an asymmetric grid")
    if scale is not None and offset is None and not symmetric:
        raise ValueError("fake_quantize: an asymmetric grid with a given scale needs its offset")
    if scale is not None and offset is not None and scale.numel() != offset.numel():
        raise ValueError("fake_quantize: scale and offset have the same length")


__all__ = ["SHRINK", "SMALLEST_SCALE", "asymmetric_range", "fake_quantize", "is_extreme"]
