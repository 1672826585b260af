"""Blockwise int8 and int4 payloads for gradient reduction, in plain torch.

A payload of c elements holds ceil(c / block) fp32 scales, then the quantized values of that many whole blocks: one byte
each, or two to a byte (the even element in the low nibble), in two's complement; those beyond c are 0.

    scale = max|t| / Q   (Q = 127 or 7)      q = clamp(round(t / scale), -Q, Q)      new residual = t - q * scale

where t = x, or x + residual. A scale below 2^-126 is stored as 0 with q = 0. A block with a NaN or an Inf has
scale NaN and q = 0, so that every receiver reads NaN, and its residual is left as it is. fp32 throughout, true
division, half to even.
"""

from __future__ import annotations

import torch

from ds_compress.ops.checks import (
    check_block_dequantize,
    check_block_quantize,
    check_block_reduce,
    check_block_reduce_quantize,
)
from ds_compress.ops.reference.division import divided
from ds_compress.ops.reference.fake_quantize import SMALLEST_SCALE

_QUANT_MAX = {8: 127, 4: 7}
_INFINITY_BITS = 0x7F800000
# Elements worked on at a time, so that the fp32 copies of a chunk stay in cache.
_CHUNK = 1 << 17


@torch.no_grad()
def block_quantize(
    x: torch.Tensor,
    payloads: torch.Tensor,
    residual: torch.Tensor | None,
    chunk: int,
    bits: int,
    block: int,
) -> None:
    """Writes elements w * chunk to (w + 1) * chunk of x as payload w; elements beyond x are 0.

    Args:
        x: (n,) contiguous, fp32, bf16 or fp16.
        payloads: uint8 (W, payload_bytes(chunk, bits, block)) contiguous, W * chunk >= n; written.
        residual: fp32 (n,) added to x, then replaced by what the quantized values do not hold.
        bits: 8 or 4. block: a multiple of 32 up to 8192.

    >>> x = torch.tensor([1.0, -0.5] * 16)
    >>> payloads = torch.empty(1, F.payload_bytes(32, 8, 32), dtype=torch.uint8)
    >>> F.block_quantize(x, payloads, None, chunk=32, bits=8, block=32)
    >>> payloads.shape
    torch.Size([1, 36])
    """
    check_block_quantize(x, payloads, residual, chunk, bits, block)
    for row, payload in enumerate(payloads):
        begin = min(row * chunk, x.numel())
        end = min(begin + chunk, x.numel())
        for first, last in _block_ranges(chunk, block):
            part = slice(min(begin + first * block, end), min(begin + last * block, end))
            values = x[part].float()
            _write(payload, values, None if residual is None else residual[part], first, last, bits, block)


@torch.no_grad()
def block_dequantize(payloads: torch.Tensor, out: torch.Tensor, chunk: int, bits: int, block: int) -> None:
    """The inverse of `block_quantize`: out (n,) fp32, bf16 or fp16 gets q * scale.

    >>> x, out = torch.tensor([1.0, -1.0] * 16), torch.empty(32)
    >>> payloads = torch.empty(1, F.payload_bytes(32, 8, 32), dtype=torch.uint8)
    >>> F.block_quantize(x, payloads, None, chunk=32, bits=8, block=32)
    >>> F.block_dequantize(payloads, out, chunk=32, bits=8, block=32)
    >>> out[:2]
    tensor([ 1., -1.])
    """
    check_block_dequantize(payloads, out, chunk, bits, block)
    for row, payload in enumerate(payloads):
        begin = min(row * chunk, out.numel())
        target = out[begin : begin + chunk]
        for first, last in _block_ranges(chunk, block):
            if first * block < target.numel():
                scales, quantized = _read(payload, first, last, bits, block)
                part = target[first * block : last * block]
                part.copy_((quantized * scales[:, None]).view(-1)[: part.numel()])


@torch.no_grad()
def block_reduce(payloads: torch.Tensor, out: torch.Tensor, bits: int, block: int, multiplier: float) -> None:
    """out = the sum over the rows of `payloads`, in order, of q * (scale * multiplier).

    Args:
        payloads: uint8 (W, payload_bytes(c, bits, block)) contiguous, W >= 1.
        out: fp32 (c,) contiguous; written.

    >>> out, payloads = torch.empty(32), torch.empty(2, F.payload_bytes(32, 8, 32), dtype=torch.uint8)
    >>> F.block_quantize(torch.ones(64), payloads, None, chunk=32, bits=8, block=32)
    >>> F.block_reduce(payloads, out, bits=8, block=32, multiplier=0.5)
    >>> out[:2]
    tensor([1., 1.])
    """
    check_block_reduce(payloads, out, bits, block)
    for first, last in _block_ranges(out.numel(), block):
        part = out[first * block : last * block]
        total = _sum(payloads, bits, block, multiplier, first, last)
        part.copy_(total.view(-1)[: part.numel()])


@torch.no_grad()
def block_reduce_quantize(
    payloads: torch.Tensor,
    payload: torch.Tensor,
    residual: torch.Tensor | None,
    numel: int,
    bits: int,
    block: int,
    multiplier: float,
) -> None:
    """Writes the sum of `block_reduce` (plus `residual`, fp32 (numel,), as in `block_quantize`) as one payload.

    >>> size = F.payload_bytes(32, 8, 32)
    >>> payloads = torch.empty(2, size, dtype=torch.uint8)
    >>> payload, out = torch.empty(size, dtype=torch.uint8), torch.empty(32)
    >>> F.block_quantize(torch.ones(64), payloads, None, chunk=32, bits=8, block=32)
    >>> F.block_reduce_quantize(payloads, payload, None, numel=32, bits=8, block=32, multiplier=0.5)
    >>> F.block_dequantize(payload[None], out, chunk=32, bits=8, block=32)
    >>> out[:2]
    tensor([1., 1.])
    """
    check_block_reduce_quantize(payloads, payload, residual, numel, bits, block)
    for first, last in _block_ranges(numel, block):
        part = slice(first * block, min(last * block, numel))
        total = _sum(payloads, bits, block, multiplier, first, last).view(-1)
        values = total[: part.stop - part.start]
        _write(payload, values, None if residual is None else residual[part], first, last, bits, block)


def _block_ranges(numel: int, block: int) -> list[tuple[int, int]]:
    """(first, last) of successive runs of blocks of about `_CHUNK` elements."""
    blocks, step = -(-numel // block), max(1, _CHUNK // block)
    return [(first, min(first + step, blocks)) for first in range(0, blocks, step)]


def _write(
    payload: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor | None,
    first: int,
    last: int,
    bits: int,
    block: int,
) -> None:
    """Blocks first to last of one payload from `values` (fp32; missing ones are 0), and their residual."""
    if residual is not None:
        values = values + residual
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, (last - first) * block - count)).view(-1, block)
    largest = _QUANT_MAX[bits]
    magnitude = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1)
    scale = divided(magnitude.view(torch.float32), largest)
    finite = magnitude < _INFINITY_BITS
    live = (finite & (scale >= SMALLEST_SCALE))[:, None]
    quantized = (blocks / scale[:, None]).round_().clamp_(-largest, largest)
    quantized = torch.where(live, quantized, 0.0).to(torch.int8)
    scale = torch.where(live[:, 0], scale, 0.0)
    if residual is not None:
        rest = blocks - quantized * scale[:, None]
        old = torch.nn.functional.pad(residual, (0, blocks.numel() - count)).view(-1, block)
        residual.copy_(torch.where(finite[:, None], rest, old).view(-1)[:count])
    scale = torch.where(finite, scale, torch.nan)
    _scale_bytes(payload, first, last).copy_(scale.view(torch.uint8))
    octets = quantized.view(torch.uint8).view(-1)
    if bits == 4:
        pairs = octets.view(-1, 2)
        octets = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    _value_bytes(payload, first, last, bits, block).copy_(octets)


def _read(
    payload: torch.Tensor, first: int, last: int, bits: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (last - first,) and quantized (last - first, block), both fp32."""
    scales = _scale_bytes(payload, first, last).clone().view(torch.float32)
    octets = _value_bytes(payload, first, last, bits, block)
    if bits == 4:
        nibbles = torch.stack((octets << 4, octets & 0xF0), 1).view(-1).clone().view(torch.int8)
        quantized = nibbles >> 4
    else:
        quantized = octets.clone().view(torch.int8)
    return scales, quantized.view(-1, block).float()


def _sum(
    payloads: torch.Tensor, bits: int, block: int, multiplier: float, first: int, last: int
) -> torch.Tensor:
    """fp32 (last - first, block), the sum over the payloads in order."""
    factor = torch.full((), multiplier, dtype=torch.float32, device=payloads.device)
    total: torch.Tensor | None = None
    for payload in payloads:
        scales, quantized = _read(payload, first, last, bits, block)
        quantized.mul_((scales * factor)[:, None])
        total = quantized if total is None else total.add_(quantized)
    assert total is not None
    return total


def _scale_bytes(payload: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return payload[4 * first : 4 * last]


def _value_bytes(payload: torch.Tensor, first: int, last: int, bits: int, block: int) -> torch.Tensor:
    size = block * bits // 8
    begin = payload.numel() // (4 + size) * 4
    return payload[begin + first * size : begin + last * size]


__all__ = [
    "block_dequantize",
    "block_quantize",
    "block_reduce",
    "block_reduce_quantize",
]
