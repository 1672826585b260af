"""Integer linear layers in plain torch: the formulas that the kernels of `csrc` reproduce.

A row of x is quantized to int8 (its own scale, or a given one), multiplied with integer weights exactly, and the
int32 sums are dequantized, biased and activated in fp32, cast last. Exactness comes from float64: every sum is below
2^31. Without activation, or with relu, the kernels give the same bits; the other activations are computed here in
float64 and rounded once.

A packed weight of this module (layout 0) is the header, then for int8 and 2:4 weights the row-major codes; for int4
weights the fp32 scales and then the codes in pairs, the even column in the low nibble.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from ds_compress.ops.reference.division import divided
from ds_compress.ops.schemas import HEADER_BYTES, packed_bytes

MAGIC = int.from_bytes(b"DSCPACK1", "little")
LAYOUT = 0
SMALLEST_SCALE = 2.0**-126
LARGEST_SUM = 2**31 - 1
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Where the formula would multiply an infinity by 0, its limit; both activations are 0 in float64 long before.
_DEEP = -1000.0
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": lambda y: torch.where(y < 0, 0.0, y),
    "gelu_erf": lambda y: functional.gelu(y.double().clamp_min(_DEEP)).float(),
    "gelu_tanh": lambda y: functional.gelu(y.double().clamp_min(_DEEP), approximate="tanh").float(),
    "silu": lambda y: functional.silu(y.double().clamp_min(_DEEP)).float(),
}


def int8_linear_pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes int8 (N, K) as a packed weight, uint8 (packed_bytes,).

    Raises:
        ValueError: wrong dtype or shape.

    >>> F.int8_linear_pack(torch.ones(2, 4, dtype=torch.int8)).dtype
    torch.uint8
    """
    _check_codes(codes)
    rows, columns = codes.shape
    return _pack(codes.contiguous().view(torch.uint8), rows, columns, packed_bytes(rows, columns))


def int8_linear_quantize_pack(weight: torch.Tensor, scale: torch.Tensor, steps: int) -> torch.Tensor:
    """`int8_linear_pack` of clamp(rint(weight / scale), -steps, 127); a quotient that is NaN gives code 0.

    weight (N, K) fp32, bf16 or fp16; scale fp32 (N,) or (1,).

    Raises:
        ValueError: wrong dtype or shape, or `steps` is neither 127 nor 128.

    >>> weight = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    >>> packed = F.int8_linear_quantize_pack(weight, weight.abs().amax(1) / 127, 127)
    >>> F.int8_linear(torch.tensor([[1.0, 0.0]]), packed, weight.abs().amax(1) / 127).round(decimals=2)
    tensor([[0.5000, 2.0000]])
    """
    _check_steps(steps)
    if weight.dim() != 2 or weight.dtype not in FLOATS:
        raise ValueError(
            f"weight is (out_features, in_features) in fp32, bf16 or fp16, got {_described(weight)}"
        )
    if scale.dtype is not torch.float32 or scale.dim() != 1 or scale.numel() not in (1, weight.shape[0]):
        raise ValueError(f"scale is fp32 ({weight.shape[0]},) or (1,), got {_described(scale)}")
    return int8_linear_pack(_codes(weight.float(), scale.unsqueeze(1), steps).to(torch.int8))


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
    """activation(x @ weight.T + bias) with int8 codes on both sides.

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
    if weight_scale.dtype is not torch.float32 or weight_scale.shape != (rows,):
        raise ValueError(f"weight_scale is fp32 ({rows},), got {_described(weight_scale)}")
    _check_call(x, rows, columns, bias, input_scale, steps, activation, out_dtype)
    codes, scale = _quantize_rows(x, input_scale, steps)
    weight = packed[HEADER_BYTES : HEADER_BYTES + rows * columns].view(torch.int8).view(rows, columns)
    y = _exact_product(codes, weight).mul_(scale.unsqueeze(1) * weight_scale)
    return _finish(y, x, bias, activation, out_dtype)


def int4_linear_pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes int8 (N, K) in [-8, 7] with their scales fp32 (N, groups) as a packed weight.

    Raises:
        ValueError: wrong dtype, shape or a code out of range.

    >>> codes = torch.full((2, 32), 7, dtype=torch.int8)
    >>> F.int4_linear_pack(codes, torch.ones(2, 1)).dtype
    torch.uint8
    """
    _check_codes(codes)
    rows, columns = codes.shape
    if scale.dtype is not torch.float32 or scale.dim() != 2 or scale.shape[0] != rows:
        raise ValueError(f"scale is fp32 ({rows}, groups), got {_described(scale)}")
    if codes.numel() and not bool(((codes >= -8) & (codes <= 7)).all()):
        raise ValueError("int4 codes lie in [-8, 7]")
    groups = scale.shape[1]
    even = functional.pad(codes, (0, columns % 2)).view(torch.uint8)
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
    if group_size < 32 or group_size % 32 or -(-columns // group_size) != groups:
        raise ValueError(
            f"group_size is a multiple of 32 that makes {groups} groups of {columns} columns, got {group_size}"
        )
    _check_call(x, rows, columns, bias, input_scale, steps, activation, out_dtype)
    codes, input_scales = _quantize_rows(x, input_scale, steps)
    body = packed[HEADER_BYTES:]
    scale = body[: 4 * rows * groups].view(torch.float32).view(rows, groups)
    width = -(-columns // 2)
    pairs = body[4 * rows * groups :][: rows * width].view(rows, width)
    weight = torch.stack([pairs & 15, pairs >> 4], dim=2).view(rows, 2 * width)[:, :columns]
    weight = ((weight ^ 8).to(torch.int8) - 8).contiguous()
    y = codes.new_zeros((codes.shape[0], rows))
    for group in range(groups):
        part = slice(group * group_size, (group + 1) * group_size)
        product = _exact_product(codes[:, part], weight[:, part]).mul_(scale[:, group])
        y = product if group == 0 else y.add_(product)
    return _finish(y.mul_(input_scales.unsqueeze(1)), x, bias, activation, out_dtype)


def sparse24_linear_pack(codes: torch.Tensor) -> torch.Tensor:
    """`int8_linear_pack` of codes (N, K) that have at most 2 non-zeros in every 4 neighbours of a row.

    Raises:
        ValueError: wrong dtype or shape, K is no multiple of 4, or a run of 4 has more non-zeros.

    >>> F.sparse24_linear_pack(torch.tensor([[3, 0, 0, -5]], dtype=torch.int8)).dtype
    torch.uint8
    """
    _check_codes(codes)
    if codes.shape[1] % 4:
        raise ValueError(f"2:4 weights have a multiple of 4 columns, got {codes.shape[1]}")
    crowded = (codes != 0).reshape(codes.shape[0], codes.shape[1] // 4, 4).sum(dim=2) > 2
    if bool(crowded.any()):
        row, run = (int(i) for i in crowded.nonzero()[0])
        raise ValueError(
            f"2:4 weights have at most 2 non-zeros in 4 columns: row {row}, columns {4 * run} to {4 * run + 3}"
        )
    return int8_linear_pack(codes)


def sparse24_linear(
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
    """`int8_linear` of a weight from `sparse24_linear_pack`; the zeros are multiplied like all others here.

    >>> packed = F.sparse24_linear_pack(torch.tensor([[127, 0, 0, 127]], dtype=torch.int8))
    >>> F.sparse24_linear(torch.ones(1, 4), packed, torch.tensor([1 / 127])).round()
    tensor([[2.]])
    """
    return int8_linear(
        x,
        packed,
        weight_scale,
        bias,
        input_scale,
        steps=steps,
        activation=activation,
        out_dtype=out_dtype,
    )


# --- parts -------------------------------------------------------------------------------------------------


def _codes(values: torch.Tensor, scale: torch.Tensor, steps: int) -> torch.Tensor:
    return values.div(scale).round_().clamp_(-steps, 127).nan_to_num_(0.0)


def _quantize_rows(
    x: torch.Tensor, input_scale: torch.Tensor | None, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole codes as fp32 (M, K), scales fp32 (M,)) of x (..., K)."""
    values = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).float()
    if input_scale is not None:
        scale = torch.where(values.isnan().any(dim=1), torch.nan, input_scale)
    elif values.numel() == 0:
        scale = values.new_full((values.shape[0],), SMALLEST_SCALE)
    else:
        largest = values.abs().amax(dim=1)
        scale = torch.where(largest.isfinite(), divided(largest, steps).clamp_min(SMALLEST_SCALE), torch.nan)
    return _codes(values, scale.unsqueeze(1), steps), scale


def _exact_product(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """codes (M, K) @ weight (N, K).T, exact, rounded to fp32 once; sums that are zero are +0.0 as an integer's."""
    return (codes.double() @ weight.double().T).add_(0.0).float()


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
        raise ValueError(f"a packed weight is uint8 (bytes,), got {_described(packed)}")
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


def _check_codes(codes: torch.Tensor) -> None:
    if codes.dtype is not torch.int8 or codes.dim() != 2:
        raise ValueError(f"codes are int8 (out_features, in_features), got {_described(codes)}")


def _check_steps(steps: int) -> None:
    if steps not in (127, 128):
        raise ValueError(f"steps are 127 or 128, got {steps}")


def _check_call(
    x: torch.Tensor,
    rows: int,
    columns: int,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    steps: int,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    if x.dim() == 0 or x.shape[-1] != columns or x.dtype not in FLOATS:
        raise ValueError(f"x is (..., {columns}) in fp32, bf16 or fp16, got {_described(x)}")
    if bias is not None and (bias.dtype is not torch.float32 or bias.shape != (rows,)):
        raise ValueError(f"bias is fp32 ({rows},), got {_described(bias)}")
    if input_scale is not None and (input_scale.dtype is not torch.float32 or input_scale.shape != (1,)):
        raise ValueError(f"input_scale is fp32 (1,), got {_described(input_scale)}")
    _check_steps(steps)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if out_dtype is not None and out_dtype not in FLOATS:
        raise ValueError(f"out_dtype is fp32, bf16 or fp16, got {out_dtype}")
    if columns * steps * 128 > LARGEST_SUM:
        raise ValueError(
            f"{columns} columns may overflow an int32 sum: at most {LARGEST_SUM // (128 * steps)} with {steps} steps"
        )


def _described(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
