"""Integer linear layers in plain torch: the formulas that the kernels of `csrc` reproduce.

A row of x is quantized to int8 (its own scale, or a given one), multiplied with integer weights exactly, and the
int32 sums are dequantized, biased and activated in fp32, cast last. Exactness comes from float64: every sum is below
2^31. Without activation, or with relu, the kernels give the same bits; the other activations are computed here in
float64 and rounded once.

A packed weight of this module (layout 0) is the header, then for int8 weights the row-major quantized values; for int4
weights the fp32 scales and then the values in pairs, the even column in the low nibble.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from ds_compress.ops.checks import (
    check_groups,
    check_int4_scale,
    check_linear,
    check_quantize_pack,
    check_quantized,
    check_weight_scale,
    described,
)
from ds_compress.ops.reference.division import divided
from ds_compress.ops.sizes import HEADER_BYTES, packed_bytes

MAGIC = int.from_bytes(b"DSCPACK1", "little")
LAYOUT = 0
SMALLEST_SCALE = 2.0**-126

# Where the formula would multiply an infinity by 0, its limit; both activations are 0 in float64 long before.
_DEEP = -1000.0
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": lambda y: torch.where(y < 0, 0.0, y),
    "gelu_erf": lambda y: functional.gelu(y.double().clamp_min(_DEEP)).float(),
    "gelu_tanh": lambda y: functional.gelu(y.double().clamp_min(_DEEP), approximate="tanh").float(),
    "silu": lambda y: functional.silu(y.double().clamp_min(_DEEP)).float(),
}


def int8_linear_pack(quantized: torch.Tensor) -> torch.Tensor:
    """int8 values (N, K) as a packed weight, uint8 (packed_bytes,).

    Raises:
        ValueError: wrong dtype or shape.

    >>> F.int8_linear_pack(torch.ones(2, 4, dtype=torch.int8)).dtype
    torch.uint8
    """
    check_quantized(quantized)
    rows, columns = quantized.shape
    return _pack(quantized.contiguous().view(torch.uint8), rows, columns, packed_bytes(rows, columns))


def int8_linear_quantize_pack(weight: torch.Tensor, scale: torch.Tensor, steps: int) -> torch.Tensor:
    """`int8_linear_pack` of clamp(rint(weight / scale), -steps, 127); a quotient that is NaN gives 0.

    weight (N, K) fp32, bf16 or fp16; scale fp32 (N,) or (1,).

    Raises:
        ValueError: wrong dtype or shape, or `steps` is neither 127 nor 128.

    >>> weight = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    >>> packed = F.int8_linear_quantize_pack(weight, weight.abs().amax(1) / 127, 127)
    >>> F.int8_linear(torch.tensor([[1.0, 0.0]]), packed, weight.abs().amax(1) / 127).round(decimals=2)
    tensor([[0.5000, 2.0000]])
    """
    check_quantize_pack(weight, scale, steps)
    return int8_linear_pack(_quantize(weight.float(), scale.unsqueeze(1), steps).to(torch.int8))


def int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    steps: int = 127,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """activation(x @ weight.T + bias) with int8 values on both sides.

    x (..., K) fp32, bf16 or fp16; packed from `int8_linear_pack`; weight_scale fp32 (N,); bias fp32 (N,);
    input_scale fp32 (1,), or None for one scale per row of x: max(amax / steps, 2^-126). A row with NaN, and with its
    own scale also one with Inf, gives NaN. activation: none, relu, gelu_erf, gelu_tanh, silu. Returns (..., N) in
    out_dtype (fp32, bf16, fp16), by default that of x.

    Raises:
        ValueError: wrong dtype, shape, steps or activation, or a weight that was packed for other kernels.

    >>> packed = F.int8_linear_pack(torch.tensor([[127, 0], [0, -127]], dtype=torch.int8))
    >>> F.int8_linear(torch.tensor([[2.0, 1.0]]), packed, torch.tensor([1 / 127, 1 / 127]), activation="relu").round()
    tensor([[2., 0.]])
    """
    rows, columns, _ = _unpack_header(packed, int4=False)
    check_weight_scale(weight_scale, rows)
    check_linear(x, rows, columns, bias, input_scale, steps, activation, out_dtype)
    quantized, scale = _quantize_rows(x, input_scale, steps)
    weight = packed[HEADER_BYTES : HEADER_BYTES + rows * columns].view(torch.int8).view(rows, columns)
    y = _exact_product(quantized, weight).mul_(scale.unsqueeze(1) * weight_scale)
    return _finish(y, x, bias, activation, out_dtype)


def int4_linear_pack(quantized: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 values (N, K) in [-8, 7] with their scales fp32 (N, groups) as a packed weight.

    Raises:
        ValueError: wrong dtype, shape or a value out of range.

    >>> quantized = torch.full((2, 32), 7, dtype=torch.int8)
    >>> F.int4_linear_pack(quantized, torch.ones(2, 1)).dtype
    torch.uint8
    """
    check_quantized(quantized)
    rows, columns = quantized.shape
    check_int4_scale(scale, rows)
    if quantized.numel() and not bool(((quantized >= -8) & (quantized <= 7)).all()):
        raise ValueError("int4 values lie in [-8, 7]")
    groups = scale.shape[1]
    even = functional.pad(quantized, (0, columns % 2)).view(torch.uint8)
    nibbles = (even[:, 0::2] & 15) | (even[:, 1::2] << 4)
    body = torch.cat([scale.contiguous().view(-1).view(torch.uint8), nibbles.reshape(-1)])
    return _pack(body, rows, columns, packed_bytes(rows, columns, bits=4, groups=groups), groups)


def int4_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    steps: int = 127,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`int8_linear` with int4 weights, `group_size` columns to a scale (a multiple of 32; the last may be short).

    Each group's int32 sum times its scale, added in fp32 in the order of the groups; then times the scale of the row.

    Raises:
        ValueError: as `int8_linear`, or a group size or number of rows that the weight was not packed with.

    >>> packed = F.int4_linear_pack(torch.full((2, 32), 7, dtype=torch.int8), torch.full((2, 1), 1 / 7))
    >>> F.int4_linear(torch.ones(1, 32), packed, out_features=2, group_size=32).round()
    tensor([[32., 32.]])
    """
    rows, columns, groups = _unpack_header(packed, int4=True)
    if out_features != rows:
        raise ValueError(f"this weight has {rows} out_features, got {out_features}")
    check_groups(group_size, columns, groups)
    check_linear(x, rows, columns, bias, input_scale, steps, activation, out_dtype)
    quantized, input_scales = _quantize_rows(x, input_scale, steps)
    body = packed[HEADER_BYTES:]
    scale = body[: 4 * rows * groups].view(torch.float32).view(rows, groups)
    width = -(-columns // 2)
    pairs = body[4 * rows * groups :][: rows * width].view(rows, width)
    weight = torch.stack([pairs & 15, pairs >> 4], dim=2).view(rows, 2 * width)[:, :columns]
    weight = ((weight ^ 8).to(torch.int8) - 8).contiguous()
    y = quantized.new_zeros((quantized.shape[0], rows))
    for group in range(groups):
        part = slice(group * group_size, (group + 1) * group_size)
        product = _exact_product(quantized[:, part], weight[:, part]).mul_(scale[:, group])
        y = product if group == 0 else y.add_(product)
    return _finish(y.mul_(input_scales.unsqueeze(1)), x, bias, activation, out_dtype)


# --- parts -------------------------------------------------------------------------------------------------


def _quantize(values: torch.Tensor, scale: torch.Tensor, steps: int) -> torch.Tensor:
    return values.div(scale).round_().clamp_(-steps, 127).nan_to_num_(0.0)


def _quantize_rows(
    x: torch.Tensor, input_scale: torch.Tensor | None, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers as fp32 (M, K), scales fp32 (M,)) of x (..., K)."""
    values = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    if input_scale is not None:
        scale = torch.where(values.isnan().any(dim=1), torch.nan, input_scale)
    elif values.numel() == 0:
        scale = values.new_full((values.shape[0],), SMALLEST_SCALE)
    else:
        largest = values.abs().amax(dim=1)
        scale = torch.where(largest.isfinite(), divided(largest, steps).clamp_min(SMALLEST_SCALE), torch.nan)
    return _quantize(values, scale.unsqueeze(1), steps), scale


def _exact_product(quantized: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """quantized (M, K) @ weight (N, K).T, exact, rounded to fp32 once; sums that are zero are +0.0 as an integer's."""
    return (quantized.double() @ weight.double().T).add_(0.0).float()


def _finish(
    y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype | None,
) -> torch.Tensor:
    if bias is not None:
        y = y.add_(bias)
    return ACTIVATIONS[activation](y).to(out_dtype or x.dtype).view(*x.shape[:-1], y.shape[1])


def _pack(body: torch.Tensor, rows: int, columns: int, size: int, groups: int = 0) -> torch.Tensor:
    packed = body.new_zeros((size,), dtype=torch.uint8)
    header = torch.tensor([MAGIC, LAYOUT, rows, columns, groups, 0, 0, 0], dtype=torch.int64)
    packed[:HEADER_BYTES] = header.view(torch.uint8).to(packed.device)
    packed[HEADER_BYTES : HEADER_BYTES + body.numel()] = body.reshape(-1)
    return packed


def _unpack_header(packed: torch.Tensor, int4: bool) -> tuple[int, int, int]:
    """(rows, columns, groups); raises ValueError for what this module did not pack."""
    if packed.dtype is not torch.uint8 or packed.dim() != 1 or packed.numel() < HEADER_BYTES:
        raise ValueError(f"a packed weight is uint8 (bytes,), got {described(packed)}")
    magic, layout, rows, columns, groups, *_ = packed[:HEADER_BYTES].view(torch.int64).tolist()
    if magic != MAGIC:
        raise ValueError("this is no packed weight: pack it with int8_linear_pack or its relatives")
    if layout != LAYOUT:
        raise ValueError(
            f"this weight was packed for other kernels (layout {layout}); plain torch reads layout {LAYOUT}: "
            "pack it again"
        )
    if columns and int4 != (groups > 0):
        raise ValueError(f"this weight was packed as {'int4' if groups else 'int8'}: pack it again")
    if packed.numel() != packed_bytes(rows, columns, 4 if groups else 8, groups):
        raise ValueError(
            f"a packed weight of ({rows}, {columns}) has another size than {packed.numel()} bytes"
        )
    return rows, columns, groups
