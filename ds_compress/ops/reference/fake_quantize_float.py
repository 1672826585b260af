"""Fake quantization to floating-point numbers of few bits, by blocks of the rows of a matrix, in plain torch."""

from __future__ import annotations

import torch

from ds_compress.ops.checks import check_fake_quantize_float
from ds_compress.ops.reference.float_formats import FloatFormat, ScaleKind, block_scale, round_to_format
from ds_compress.ops.reference.mask import mask_pack

# Elements worked on at a time, so that the fp32 copies of a chunk stay in cache.
_CHUNK_OF_A_DEVICE = 1 << 24
_CHUNK = 1 << 17


def fake_quantize_float(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    *,
    exponent_bits: int,
    mantissa_bits: int,
    largest: float,
    scale_kind: int,
    block: int,
    with_mask: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y = q * scale with q = clamp(round(x / scale), -largest, largest), block by block of each row.

    Rounding is to the nearest number of the format, ties to even; see `float_formats` for formats and scales. fp32
    arithmetic, cast last.

    Args:
        x: (R, C) contiguous, fp32, bf16 or fp16; `block` divides C.
        scale: given, fp32 (R, C / block) or (1, 1); without it scales are chosen from x.
        global_scale: fp32 (1,), of chosen scales of kind 2 only.
        exponent_bits, mantissa_bits, largest: the format: 2 to 5, 1 to 3, and its largest number.
        scale_kind: how a chosen scale is stored: 0 fp32, 1 a power of two (E8M0), 2 E4M3 divided by `global_scale`.
        with_mask: whether the mask of what does not saturate is wanted.

    Returns:
        y like x; the scales used, fp32 (R, C / block) or as given; the mask |round(x / scale)| <= largest, the rounding
        with an unlimited exponent, uint8 (ceil(R C / 8),), bit i of byte j for flat element 8 j + i, empty unless
        `with_mask`.

    A block with a NaN or an Inf has scale NaN, and everything in it is NaN. With a given scale Inf saturates and a NaN
    stays its own. Zeros keep their sign. Nothing finite becomes Inf: what lies beyond the dtype's largest value ends
    there.

    Raises:
        ValueError: for any other shape, dtype or device.

    >>> x = torch.tensor([[6.0, -0.7, 2.4, 0.1]])
    >>> e2m1 = dict(exponent_bits=2, mantissa_bits=1, largest=6.0)
    >>> F.fake_quantize_float(x, **e2m1, scale_kind=0, block=4, with_mask=False)[0]
    tensor([[ 6.0000, -0.5000,  2.0000,  0.0000]])
    """
    check_fake_quantize_float(
        x, scale, global_scale, exponent_bits, mantissa_bits, largest, scale_kind, block
    )
    number = FloatFormat("", exponent_bits, mantissa_bits, largest)
    kind = ScaleKind(scale_kind)
    rows, columns = x.shape
    blocks = columns // block
    y = torch.empty_like(x)
    mask = torch.empty(x.shape, dtype=torch.bool, device=x.device) if with_mask else None
    used = x.new_empty((rows, blocks), dtype=torch.float32) if scale is None else scale.clone()
    limit = torch.finfo(x.dtype).max
    height = max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK_OF_A_DEVICE) // max(1, columns))
    for begin in range(0, rows if columns else 0, height):
        part = slice(begin, begin + height)
        exact = x[part].float().view(-1, blocks, block)
        if scale is None:
            used[part] = block_scale(exact.abs().amax(2), number, kind, global_scale)
        of_blocks = used if used.numel() == 1 else used[part]
        of_values = of_blocks.unsqueeze(2)
        rounded = round_to_format(exact / of_values, number)
        if mask is not None:
            mask[part] = (rounded.abs() <= largest).view(-1, columns)
        values = rounded.clamp_(-largest, largest).mul_(of_values).clamp_(-limit, limit)
        y[part] = values.view(-1, columns).to(x.dtype)
    bits = mask_pack(mask.view(-1)) if mask is not None else x.new_empty(0, dtype=torch.uint8)
    return y, used, bits


__all__ = ["fake_quantize_float"]
