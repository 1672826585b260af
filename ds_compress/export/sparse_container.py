"""Tensors with many zeros in less space: one bit per element, and the values of the others, both deflated.

`packed` makes one uint8 tensor of a tensor, `unpacked` makes the same bits of it again:

    8 bytes     DSCZERO1
    4 bytes     length of what follows as JSON, little endian
    JSON        dtype, shape; fill: the bits that are left out, as an integer; count: of the other elements;
                mask, values: [bytes stored, how]
    mask        bit i of byte j says that element 8 j + i is another one than the fill; zeros behind the last element
    values      those elements, in order and in the dtype's bytes

how: "raw", or "deflate", which is zlib's. Deflating is what brings 80 % of zeros to about a quarter: bits of a mask
that are seldom 1 take 0.73 of a bit, and int8 values of a weight 7 of 8. The bits are those of the elements: -0.0 and
NaN stay.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from typing import Any

import numpy as np
import torch

from ds_compress.ops import kernels

MAGIC = b"DSCZERO1"
LEAST_ZEROS = 0.3
"""With fewer a tensor stays as it is: deflating alone saves some bytes of any weight, and takes time to load."""

_SUFFIX = "_sparse"
_SMALLEST = 1024
_DTYPES: dict[str, tuple[torch.dtype, Any]] = {
    "int8": (torch.int8, np.uint8),
    "uint8": (torch.uint8, np.uint8),
    "float16": (torch.float16, np.uint16),
    "bfloat16": (torch.bfloat16, np.uint16),
    "float32": (torch.float32, np.uint32),
}
_NAMES = {dtype: name for name, (dtype, _) in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_LARGEST_DEFLATION = 1032
"""How many times larger than its stream zlib's output may be, by its format."""


def sparse_name(name: str) -> str:
    """Under which name the container of the tensor `name` is stored."""
    return name + _SUFFIX


def dense_name(name: str, stored: torch.Tensor) -> str | None:
    """The name of the tensor whose container `stored` is; None where it is none."""
    is_one = name.endswith(_SUFFIX) and stored.dtype is torch.uint8 and stored.dim() == 1
    return name.removesuffix(_SUFFIX) if is_one and _bytes_of(stored[: len(MAGIC)]) == MAGIC else None


def packed(tensor: torch.Tensor, dense_bytes: int) -> torch.Tensor | None:
    """The container of a CPU tensor, uint8 (bytes,); None where it has fewer zeros than `LEAST_ZEROS`, or is no smaller
    than `dense_bytes`.

    The fill is 0 of floats and signed integers; of uint8, whose zero may be any code, it is the most frequent one.
    """
    if tensor.dtype not in _NAMES or tensor.numel() < _SMALLEST:
        return None
    elements = np.frombuffer(_bytes_of(tensor), _DTYPES[_NAMES[tensor.dtype]][1])
    fill = int(np.bincount(elements, minlength=1).argmax()) if tensor.dtype is torch.uint8 else 0
    others = elements != fill
    count = int(others.sum())
    if count > (1 - LEAST_ZEROS) * elements.size:
        return None
    mask, how_mask = _smallest(np.packbits(others, bitorder="little").tobytes(), zlib.Z_DEFAULT_STRATEGY)
    values, how_values = _smallest(elements[others].tobytes(), zlib.Z_HUFFMAN_ONLY)
    head = {
        "dtype": _NAMES[tensor.dtype],
        "shape": list(tensor.shape),
        "fill": fill,
        "count": count,
        "mask": [len(mask), how_mask],
        "values": [len(values), how_values],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    parts = b"".join((MAGIC, struct.pack("<I", len(text)), text, mask, values))
    if len(parts) >= dense_bytes:
        return None
    return torch.frombuffer(bytearray(parts), dtype=torch.uint8)


def unpacked(container: torch.Tensor) -> torch.Tensor:
    """The tensor of a container.

    Raises:
        ValueError: it is damaged, and how; everything that is stored twice is compared.
    """
    data = _bytes_of(container)
    head, begin = _head_of(data)
    dtype = _DTYPES[head["dtype"]][0]
    shape, count = head["shape"], head["count"]
    numel = math.prod(shape)
    (mask_bytes, how_mask), (value_bytes, how_values) = head["mask"], head["values"]
    if len(data) != begin + mask_bytes + value_bytes:
        raise ValueError(f"it has {len(data)} bytes, and its head says {begin + mask_bytes + value_bytes}")
    streams = data[begin : begin + mask_bytes], data[begin + mask_bytes :]
    bits = _inflated(streams[0], how_mask, -(-numel // 8), "mask")
    values = _inflated(streams[1], how_values, count * dtype.itemsize, "values")
    mask = kernels().mask_unpack(torch.frombuffer(bits, dtype=torch.uint8), numel, 0)
    found = int(mask.count_nonzero())
    if found != count or (numel % 8 and bits[-1] >> numel % 8):
        raise ValueError(f"its mask has {found} bits in {numel} elements, and {count} values are stored")
    elements = torch.full((numel,), _signed(head["fill"], dtype.itemsize), dtype=_BITS[dtype.itemsize])
    if count:
        own = torch.frombuffer(values, dtype=_BITS[dtype.itemsize])
        elements.masked_scatter_(mask, own)
    return elements.view(dtype).view(shape)


def _head_of(data: memoryview) -> tuple[dict[str, Any], int]:
    """The head of a container, of which each entry is what it may be, and where the mask begins."""
    begin = len(MAGIC) + 4
    try:
        if len(data) < begin or data[: len(MAGIC)] != MAGIC:
            raise ValueError("no head")
        begin += struct.unpack("<I", data[len(MAGIC) : begin])[0]
        head = json.loads(bytes(data[len(MAGIC) + 4 : begin]))
        numbers = [*head["shape"], head["fill"], head["count"], head["mask"][0], head["values"][0]]
        hows = {head["mask"][1], head["values"][1]}
        numel = math.prod(head["shape"])
        possible = numel <= 8 * _LARGEST_DEFLATION * (head["mask"][0] + 1) and head["count"] <= numel
        sane = all(type(number) is int and number >= 0 for number in numbers)
        if not (sane and possible and hows <= {"raw", "deflate"} and head["dtype"] in _DTYPES):
            raise ValueError("impossible entries")
        if head["fill"] >= 2 ** (8 * _DTYPES[head["dtype"]][0].itemsize):
            raise ValueError("the fill is too large")
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"its head is damaged: {error}") from error
    return head, begin


def _smallest(data: bytes, strategy: int) -> tuple[bytes, str]:
    """`data` deflated by the strategy or by Huffman codes alone, or as it is."""
    best, how = data, "raw"
    for each in {strategy, zlib.Z_HUFFMAN_ONLY}:
        deflate = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, each)
        stream = deflate.compress(data) + deflate.flush()
        if len(stream) < len(best):
            best, how = stream, "deflate"
    return best, how


def _inflated(stream: memoryview, how: str, size: int, what: str) -> bytearray:
    """Exactly `size` bytes; writable, because torch asks for it."""
    if how == "raw":
        found, whole = bytearray(stream), True
    else:
        inflate = zlib.decompressobj()
        try:
            found = bytearray(inflate.decompress(stream, size + 1))
        except zlib.error as error:
            raise ValueError(f"the bytes of its {what} are damaged: {error}") from error
        whole = inflate.eof and not inflate.unused_data
    if len(found) != size or not whole:
        problem = "have another length" if whole else "do not end there"
        raise ValueError(f"the bytes of its {what} {problem}: {size} are expected")
    return found


def _signed(bits: int, size: int) -> int:
    return bits - (1 << 8 * size) if size > 1 and bits >> (8 * size - 1) else bits


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())  # type: ignore[arg-type]
