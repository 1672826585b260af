"""Blockwise int8 and int4 messages for gradient reduction, in plain torch.

A message of c elements holds ceil(c / block) fp32 scales, then the codes of that many whole blocks: one byte
each, or two to a byte (the even element in the low nibble), in two's complement; codes beyond c are 0.

    scale = max|t| / Q   (Q = 127 or 7)      code = clamp(round(t / scale), -Q, Q)      new residual = t - code * scale

where t = x, or x + residual. A scale below 2^-126 is stored as 0 with codes 0. A block with a NaN or an Inf has
scale NaN and codes 0, so that every receiver reads NaN, and its residual is left as it is. fp32 throughout, true
division, half to even.
"""

from __future__ import annotations

import torch

from ds_compress.ops.reference.division import divided
from ds_compress.ops.reference.fake_quantize import SMALLEST_SCALE
from ds_compress.ops.schemas import message_bytes

LARGEST_BLOCK = 8192
_LARGEST_CODE = {8: 127, 4: 7}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INFINITY_BITS = 0x7F800000
# Elements worked on at a time, so that the fp32 copies of a chunk stay in cache.
_CHUNK = 1 << 17


@torch.no_grad()
def block_quantize(
    x: torch.Tensor,
    messages: torch.Tensor,
    residual: torch.Tensor | None,
    chunk: int,
    bits: int,
    block: int,
) -> None:
    """Writes elements w * chunk to (w + 1) * chunk of x as message w; elements beyond x are 0.

    Args:
        x: (n,) contiguous, fp32, bf16 or fp16.
        messages: uint8 (W, message_bytes(chunk, bits, block)) contiguous, W * chunk >= n; written.
        residual: fp32 (n,) added to x, then replaced by what the codes do not hold.
        bits: 8 or 4. block: a multiple of 32 up to 8192.

    >>> x = torch.tensor([1.0, -0.5] * 16)
    >>> messages = torch.empty(1, F.message_bytes(32, 8, 32), dtype=torch.uint8)
    >>> F.block_quantize(x, messages, None, chunk=32, bits=8, block=32)
    >>> messages.shape
    torch.Size([1, 36])
    """
    op = "block_quantize"
    _check_format(op, bits, block)
    _check(op, "x", x, 1, _FLOATS)
    _check_rows(op, messages, x.numel(), chunk, bits, block)
    if residual is not None:
        _check_residual(op, residual, x.numel())
    for row, message in enumerate(messages):
        begin = min(row * chunk, x.numel())
        end = min(begin + chunk, x.numel())
        for first, last in _block_ranges(chunk, block):
            part = slice(min(begin + first * block, end), min(begin + last * block, end))
            values = x[part].float()
            _write(message, values, None if residual is None else residual[part], first, last, bits, block)


@torch.no_grad()
def block_dequantize(messages: torch.Tensor, out: torch.Tensor, chunk: int, bits: int, block: int) -> None:
    """The inverse of `block_quantize`: out (n,) fp32, bf16 or fp16 gets code * scale.

    >>> x, out = torch.tensor([1.0, -1.0] * 16), torch.empty(32)
    >>> messages = torch.empty(1, F.message_bytes(32, 8, 32), dtype=torch.uint8)
    >>> F.block_quantize(x, messages, None, chunk=32, bits=8, block=32)
    >>> F.block_dequantize(messages, out, chunk=32, bits=8, block=32)
    >>> out[:2]
    tensor([ 1., -1.])
    """
    op = "block_dequantize"
    _check_format(op, bits, block)
    _check(op, "out", out, 1, _FLOATS)
    _check_rows(op, messages, out.numel(), chunk, bits, block)
    for row, message in enumerate(messages):
        begin = min(row * chunk, out.numel())
        target = out[begin : begin + chunk]
        for first, last in _block_ranges(chunk, block):
            if first * block < target.numel():
                scales, codes = _read(message, first, last, bits, block)
                part = target[first * block : last * block]
                part.copy_((codes * scales[:, None]).view(-1)[: part.numel()])


@torch.no_grad()
def block_reduce(messages: torch.Tensor, out: torch.Tensor, bits: int, block: int, multiplier: float) -> None:
    """out = the sum over the rows of `messages`, in order, of code * (scale * multiplier).

    Args:
        messages: uint8 (W, message_bytes(c, bits, block)) contiguous, W >= 1.
        out: fp32 (c,) contiguous; written.

    >>> out, messages = torch.empty(32), torch.empty(2, F.message_bytes(32, 8, 32), dtype=torch.uint8)
    >>> F.block_quantize(torch.ones(64), messages, None, chunk=32, bits=8, block=32)
    >>> F.block_reduce(messages, out, bits=8, block=32, multiplier=0.5)
    >>> out[:2]
    tensor([1., 1.])
    """
    op = "block_reduce"
    _check_format(op, bits, block)
    _check(op, "out", out, 1, (torch.float32,))
    _check_summands(op, messages, out.numel(), bits, block)
    for first, last in _block_ranges(out.numel(), block):
        part = out[first * block : last * block]
        total = _sum(messages, bits, block, multiplier, first, last)
        part.copy_(total.view(-1)[: part.numel()])


@torch.no_grad()
def block_reduce_quantize(
    messages: torch.Tensor,
    message: torch.Tensor,
    residual: torch.Tensor | None,
    numel: int,
    bits: int,
    block: int,
    multiplier: float,
) -> None:
    """Writes the sum of `block_reduce` (plus `residual`, fp32 (numel,), as in `block_quantize`) as one message.

    >>> size = F.message_bytes(32, 8, 32)
    >>> messages = torch.empty(2, size, dtype=torch.uint8)
    >>> message, out = torch.empty(size, dtype=torch.uint8), torch.empty(32)
    >>> F.block_quantize(torch.ones(64), messages, None, chunk=32, bits=8, block=32)
    >>> F.block_reduce_quantize(messages, message, None, numel=32, bits=8, block=32, multiplier=0.5)
    >>> F.block_dequantize(message[None], out, chunk=32, bits=8, block=32)
    >>> out[:2]
    tensor([1., 1.])
    """
    op = "block_reduce_quantize"
    _check_format(op, bits, block)
    _check_summands(op, messages, numel, bits, block)
    _check(op, "message", message, 1, (torch.uint8,))
    if message.numel() != messages.shape[1]:
        raise ValueError(f"{op}: message has {message.numel()} bytes, the summands {messages.shape[1]}")
    if residual is not None:
        _check_residual(op, residual, numel)
    for first, last in _block_ranges(numel, block):
        part = slice(first * block, min(last * block, numel))
        total = _sum(messages, bits, block, multiplier, first, last).view(-1)
        values = total[: part.stop - part.start]
        _write(message, values, None if residual is None else residual[part], first, last, bits, block)


def _block_ranges(numel: int, block: int) -> list[tuple[int, int]]:
    """(first, last) of successive runs of blocks of about `_CHUNK` elements."""
    blocks, step = -(-numel // block), max(1, _CHUNK // block)
    return [(first, min(first + step, blocks)) for first in range(0, blocks, step)]


def _write(
    message: torch.Tensor,
    values: torch.Tensor,
    residual: torch.Tensor | None,
    first: int,
    last: int,
    bits: int,
    block: int,
) -> None:
    """Blocks first to last of one message from `values` (fp32; missing ones are 0), and their residual."""
    if residual is not None:
        values = values + residual
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, (last - first) * block - count)).view(-1, block)
    largest = _LARGEST_CODE[bits]
    magnitude = (blocks.view(torch.int32) & 0x7FFFFFFF).amax(1)
    scale = divided(magnitude.view(torch.float32), largest)
    finite = magnitude < _INFINITY_BITS
    live = (finite & (scale >= SMALLEST_SCALE))[:, None]
    codes = (blocks / scale[:, None]).round_().clamp_(-largest, largest)
    codes = torch.where(live, codes, 0.0).to(torch.int8)
    scale = torch.where(live[:, 0], scale, 0.0)
    if residual is not None:
        rest = blocks - codes * scale[:, None]
        old = torch.nn.functional.pad(residual, (0, blocks.numel() - count)).view(-1, block)
        residual.copy_(torch.where(finite[:, None], rest, old).view(-1)[:count])
    scale = torch.where(finite, scale, torch.nan)
    _scale_bytes(message, first, last).copy_(scale.view(torch.uint8))
    octets = codes.view(torch.uint8).view(-1)
    if bits == 4:
        pairs = octets.view(-1, 2)
        octets = (pairs[:, 0] & 15) | (pairs[:, 1] << 4)
    _code_bytes(message, first, last, bits, block).copy_(octets)


def _read(
    message: torch.Tensor, first: int, last: int, bits: int, block: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (last - first,) and codes (last - first, block), both fp32."""
    scales = _scale_bytes(message, first, last).clone().view(torch.float32)
    octets = _code_bytes(message, first, last, bits, block)
    if bits == 4:
        nibbles = torch.stack((octets << 4, octets & 0xF0), 1).view(-1).clone().view(torch.int8)
        codes = nibbles >> 4
    else:
        codes = octets.clone().view(torch.int8)
    return scales, codes.view(-1, block).float()


def _sum(
    messages: torch.Tensor, bits: int, block: int, multiplier: float, first: int, last: int
) -> torch.Tensor:
    """fp32 (last - first, block), the sum over the messages in order."""
    factor = torch.full((), multiplier, dtype=torch.float32, device=messages.device)
    total: torch.Tensor | None = None
    for message in messages:
        scales, codes = _read(message, first, last, bits, block)
        codes.mul_((scales * factor)[:, None])
        total = codes if total is None else total.add_(codes)
    assert total is not None
    return total


def _scale_bytes(message: torch.Tensor, first: int, last: int) -> torch.Tensor:
    return message[4 * first : 4 * last]


def _code_bytes(message: torch.Tensor, first: int, last: int, bits: int, block: int) -> torch.Tensor:
    size = block * bits // 8
    begin = message.numel() // (4 + size) * 4
    return message[begin + first * size : begin + last * size]


def _check_format(op: str, bits: int, block: int) -> None:
    if bits not in _LARGEST_CODE:
        raise ValueError(f"{op}: bits is 8 or 4, got {bits}")
    if block % 32 or not 32 <= block <= LARGEST_BLOCK:
        raise ValueError(f"{op}: block is a multiple of 32 up to {LARGEST_BLOCK}, got {block}")


def _check(op: str, name: str, tensor: torch.Tensor, dim: int, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{op}: {name} is {allowed}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.dim() != dim or not tensor.is_contiguous():
        raise ValueError(
            f"{op}: {name} is a contiguous tensor of {dim} dimensions, got {tuple(tensor.shape)}"
        )


def _check_rows(op: str, messages: torch.Tensor, numel: int, chunk: int, bits: int, block: int) -> None:
    _check(op, "messages", messages, 2, (torch.uint8,))
    if chunk < 0 or messages.shape[1] != message_bytes(chunk, bits, block):
        raise ValueError(
            f"{op}: a message of {chunk} elements has {message_bytes(max(chunk, 0), bits, block)} bytes, "
            f"got rows of {messages.shape[1]}"
        )
    if messages.shape[0] * chunk < numel:
        raise ValueError(f"{op}: {messages.shape[0]} messages of {chunk} elements do not hold {numel}")


def _check_summands(op: str, messages: torch.Tensor, numel: int, bits: int, block: int) -> None:
    if messages.dim() == 2 and messages.shape[0] < 1:
        raise ValueError(f"{op}: there is no message to add up")
    _check_rows(op, messages, 0, numel, bits, block)


def _check_residual(op: str, residual: torch.Tensor, numel: int) -> None:
    _check(op, "residual", residual, 1, (torch.float32,))
    if residual.numel() != numel:
        raise ValueError(f"{op}: residual has {residual.numel()} elements for {numel} values")


__all__ = [
    "LARGEST_BLOCK",
    "block_dequantize",
    "block_quantize",
    "block_reduce",
    "block_reduce_quantize",
]
