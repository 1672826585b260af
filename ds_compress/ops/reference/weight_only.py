"""Linear layers whose weights alone are quantized, in plain torch: what the kernels compute, bit for bit.

    y = activation(x @ weight.T + bias)
    weight[n, k] = scale[n, g] * value[n, k] (+ offset[n, g]),  g = k // group_size

Values stay integers and x becomes fixed point, so that sums of products are exact and the same on every machine:

1. The inputs of a group are cut into blocks of at most 128. A block of x becomes integers X = rint(x / unit) of 24 bits
   where x is fp32, of 16 bits where it is bf16 or fp16; unit is the least power of two with which its largest magnitude
   fits (with 1 % to spare). An input is off by less than 2^-22 (2^-14) of the largest magnitude of its block, in bf16
   by nothing where it is at least 2^-6 of that. A block with NaN or Inf makes its row NaN.
2. X = 65536 a + 256 b + c, signed bytes (16 bits: 256 b + c). Sums of their products with the block's values are exact.
3. fp32: sum = float(65536 sum_a) + float(256 sum_b + sum_c); y += (sum unit) scale; y += (float(sum of X) unit) offset,
   in the order of the blocks, beginning with 0; then the bias, the activation, the cast.

Without activation, or with relu, the kernels give the same bits; the other activations are as in `linear`.
Against x @ weight.T in exact arithmetic an element of y is off by at most

    sum over blocks of 2^-22 (2^-14) max|x| sum|weight|  +  (blocks + 4) 2^-23 sum|x weight|

(an fp32 product of K inputs has the bound K 2^-24 sum|x weight|; scale and offset count on their own in sum|weight|).
For many rows of bf16 the kernels of CPUs with AMX round the weight to bf16 in place of this; see csrc/README.md.

A packed weight of this module is the header, the fp32 scales, the fp32 offsets, and rows of values in `bits` bits.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from ds_compress.ops.checks import described, require
from ds_compress.ops.reference.linear import MAGIC, _finish
from ds_compress.ops.sizes import HEADER_BYTES, STORAGE_BITS, weight_only_bytes
from ds_compress.ops.weight_only_checks import check_weight_only, check_weight_only_pack

LAYOUT = 8
BLOCK = 128
EXCESS = {"int2": 2, "int4": 8, "int8": 128, "e2m1": 0}
E2M1_IN_HALVES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
STORAGES = tuple(STORAGE_BITS)
_LEAST_EXPONENT = 24  # of a float with a bias: its unit and the reciprocal of that are normal numbers
_INFINITY_BITS = 0x7F800000


def weight_only_linear_pack(
    values: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None, group_size: int, storage: str
) -> torch.Tensor:
    """Quantized values (N, K) with scales fp32 (N, ceil(K / group_size)) as a packed weight, uint8 (bytes,).

    storage: int2, int4, int8, or e2m1: codes of 4-bit floats, for which the values are in halves: what the codes 0 to 7
    multiply scale by is 0, 1, 2, 3, 4, 6, 8, 12. values: int8, uint8 for e2m1 and beside an offset, which has the shape
    of scale. group_size: any number.

    Raises:
        ValueError: wrong dtype or shape, or a value out of the range of its storage.

    >>> values = torch.full((2, 32), 7, dtype=torch.int8)
    >>> F.weight_only_linear_pack(values, torch.ones(2, 1), None, 32, "int4").dtype
    torch.uint8
    """
    check_weight_only_pack(values, scale, offset, group_size, storage)
    rows, columns = values.shape
    bits = STORAGE_BITS[storage]
    stored = (
        values if values.dtype is torch.uint8 else (values.to(torch.int16) + EXCESS[storage]).to(torch.uint8)
    )
    if stored.numel() and int(stored.max()) >= 2**bits:  # what is below wraps to above
        lowest = 0 if values.dtype is torch.uint8 else -EXCESS[storage]
        raise ValueError(f"values lie in [{lowest}, {lowest + 2**bits - 1}]")
    per_byte = 8 // bits
    stored = functional.pad(stored, (0, -columns % per_byte)).view(rows, -(-columns // per_byte), per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=values.device)
    parts = [scale.contiguous().view(-1).view(torch.uint8)]
    if offset is not None:
        parts.append(offset.contiguous().view(-1).view(torch.uint8))
    parts.append((stored << shifts).sum(2, dtype=torch.uint8).reshape(-1))
    packed = values.new_zeros(
        weight_only_bytes(rows, columns, group_size, storage, offset is not None), dtype=torch.uint8
    )
    header = torch.tensor(
        [
            MAGIC,
            LAYOUT,
            rows,
            columns,
            scale.shape[1],
            group_size,
            STORAGES.index(storage),
            offset is not None,
        ],
        dtype=torch.int64,
    )
    body = torch.cat([header.view(torch.uint8).to(packed.device), *parts])
    packed[: body.numel()] = body
    return packed


def weight_only_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    *,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias), of a weight of 2 to 8 bits that is dequantized while it is multiplied.

    x (..., K) fp32, bf16 or fp16; packed from `weight_only_linear_pack`; bias fp32 (N,); activation: none, relu,
    gelu_erf, gelu_tanh, silu. A row with NaN or Inf gives NaN. Returns (..., N) in out_dtype (fp32, bf16, fp16), by
    default that of x.

    Raises:
        ValueError: wrong dtype, shape or activation, or a weight that was packed for other kernels.

    >>> values, scale = torch.full((2, 32), 7, dtype=torch.int8), torch.full((2, 1), 0.5)
    >>> packed = F.weight_only_linear_pack(values, scale, None, 32, "int4")
    >>> F.weight_only_linear(torch.ones(1, 32), packed, out_features=2)
    tensor([[112., 112.]])
    """
    header = _header_of(packed)
    rows, columns, _, group_size = header[2:6]
    require(out_features == rows, lambda: f"this weight has {rows} out_features, got {out_features}")
    check_weight_only(x, out_features, bias, activation, out_dtype)
    require(x.shape[-1] == columns, lambda: f"x is (..., {columns}), got {tuple(x.shape)}")
    values, scale, offset = _unpacked(packed, header)
    y = x.new_zeros((math.prod(x.shape[:-1]), rows), dtype=torch.float32)
    for begin, end, group in _blocks(columns, group_size):
        part = x.reshape(len(y), columns)[:, begin:end]
        unit, digits = _fixed_point(part)
        sums = [digit @ values[:, begin:end].T for digit in digits]
        total = (sums[1] * 256 + sums[0]).float()
        if len(sums) == 3:
            total = (sums[2] * 65536).float() + total
        y = y + total * unit * scale[:, group]
        if offset is not None:
            whole = sum(digit.sum(1, keepdim=True) * 256**i for i, digit in enumerate(digits))
            y = y + (whole.float() * unit) * offset[:, group]
    return _finish(y, x, bias, activation, out_dtype)


def _blocks(columns: int, group_size: int) -> list[tuple[int, int, int]]:
    """(first input, behind the last one, group) of each."""
    found = []
    for group in range(-(-columns // group_size)):
        end = min(columns, (group + 1) * group_size)
        for begin in range(group * group_size, end, BLOCK):
            found.append((begin, min(end, begin + BLOCK), group))
    return found


def _fixed_point(x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """unit fp32 (M, 1), and the signed bytes of x / unit, the lowest first, as fp64 (M, block)."""
    count = 3 if x.dtype is torch.float32 else 2
    values = x.float()
    bits = values.abs().amax(1, keepdim=True).view(torch.int32)
    # A NaN that is not the largest of its row as torch compares is found here.
    is_finite = values.isfinite().all(1, keepdim=True)
    exponent = ((bits + (1 << 17)) >> 23).clamp_min(_LEAST_EXPONENT)
    exponent = torch.where(is_finite, exponent, 127)
    digits = 8 * count - 2
    unit = ((exponent - digits) << 23).view(torch.float32)
    steps = ((254 + digits - exponent) << 23).view(torch.float32)
    whole = torch.where(is_finite, values * steps, 0.0).round().to(torch.int32)
    middle = sum(128 << (8 * i) for i in range(count))
    found = []
    for i in range(count):
        found.append((((whole + middle) >> (8 * i) & 255) - 128).double())
    return torch.where(is_finite, unit, torch.nan), found


def _header_of(packed: torch.Tensor) -> list[int]:
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER_BYTES:
        raise ValueError(f"a packed weight is contiguous uint8 (bytes,), got {described(packed)}")
    header: list[int] = packed[:HEADER_BYTES].view(torch.int64).tolist()
    if header[0] != MAGIC:
        raise ValueError("this is no packed weight: pack it with weight_only_linear_pack")
    if header[1] != LAYOUT:
        raise ValueError(
            f"this weight was packed for other kernels (layout {header[1]}); plain torch reads layout {LAYOUT}: "
            "pack it again"
        )
    _, _, rows, columns, _, group_size, storage, has_offset = header
    if packed.numel() != weight_only_bytes(rows, columns, group_size, STORAGES[storage], bool(has_offset)):
        raise ValueError(
            f"a packed weight of ({rows}, {columns}) has another size than {packed.numel()} bytes"
        )
    return header


def _unpacked(
    packed: torch.Tensor, header: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(values fp64 (N, K), scale, offset)."""
    _, _, rows, columns, groups, _, storage_number, has_offset = header
    storage, body = STORAGES[storage_number], packed[HEADER_BYTES:]
    bits = STORAGE_BITS[storage]
    scales = (
        body[: 4 * rows * groups * (1 + has_offset)].view(torch.float32).view(1 + has_offset, rows, groups)
    )
    width = -(-columns * bits // 8)
    stored = body[scales.numel() * 4 :][: rows * width].view(rows, width, 1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = ((stored >> shifts) & (2**bits - 1)).view(rows, width * (8 // bits))[:, :columns]
    if storage == "e2m1":
        values = torch.tensor(E2M1_IN_HALVES, dtype=torch.float64, device=packed.device)[codes.long()]
    else:
        values = codes.double() - (0 if has_offset else EXCESS[storage])
    return values, scales[0], scales[1] if has_offset else None
