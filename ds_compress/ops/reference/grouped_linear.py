"""The integer linear layers of `linear`, of many experts at once: rows of x are sorted by expert, each with its weight.

The formula is `int8_linear` or `int4_linear` of an expert's rows alone; the kernels make one launch of all of them.
"""

from __future__ import annotations

import torch

from ds_compress.ops.checks import check_grouped, check_offset_values
from ds_compress.ops.reference.linear import int4_linear, int8_linear


def int8_grouped_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    weight_scale: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    steps: int = 127,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`int8_linear` of each expert's rows, without activation.

    x (rows, K) fp32, bf16 or fp16, the rows of expert 0 first; packed (experts, bytes), a row for each expert as
    `int8_linear_pack` makes it; weight_scale fp32 (experts, N); offsets int32 or int64 (experts,): before which row
    each expert's rows end, as in `torch._grouped_mm`, so they never decrease; bias fp32 (experts, N); input_scale fp32
    (experts,), or None for one scale per row. Returns (rows, N) in out_dtype, by default that of x. Rows behind the
    last expert's are 0, whatever x has there.

    Raises:
        ValueError: as `int8_linear`, or offsets that decrease or go beyond x, which on CUDA are not looked at: there
            they are clamped, and what comes of it is of no use.

    >>> packed = F.int8_linear_pack(torch.tensor([[127, 0], [0, 127]], dtype=torch.int8))
    >>> x, scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.full((2, 2), 1 / 127)
    >>> F.int8_grouped_linear(x, torch.stack([packed, packed]), scale, torch.tensor([1, 2])).round()
    tensor([[1., 2.],
            [3., 4.]])
    """
    check_grouped(x, packed, offsets, weight_scale.shape[-1], bias, input_scale, weight_scale)
    y = x.new_zeros((x.shape[0], weight_scale.shape[1]), dtype=out_dtype or x.dtype)
    for expert, rows in _rows_of(offsets, x.shape[0]):
        y[rows] = int8_linear(
            x[rows],
            packed[expert],
            weight_scale[expert],
            None if bias is None else bias[expert],
            None if input_scale is None else input_scale[expert : expert + 1],
            steps=steps,
            out_dtype=out_dtype,
        )
    return y


def int4_grouped_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    group_size: int,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    *,
    steps: int = 127,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`int4_linear` of each expert's rows; packed (experts, bytes) from `int4_linear_pack`, else as
    `int8_grouped_linear`.

    Raises:
        ValueError: as `int4_linear` and `int8_grouped_linear`.

    >>> packed = F.int4_linear_pack(torch.full((2, 32), 7, dtype=torch.int8), torch.full((2, 1), 1 / 7))
    >>> F.int4_grouped_linear(torch.ones(1, 32), packed.view(1, -1), 2, 32, torch.tensor([1])).round()
    tensor([[32., 32.]])
    """
    check_grouped(x, packed, offsets, out_features, bias, input_scale)
    y = x.new_zeros((x.shape[0], out_features), dtype=out_dtype or x.dtype)
    for expert, rows in _rows_of(offsets, x.shape[0]):
        y[rows] = int4_linear(
            x[rows],
            packed[expert],
            out_features,
            group_size,
            None if bias is None else bias[expert],
            None if input_scale is None else input_scale[expert : expert + 1],
            steps=steps,
            out_dtype=out_dtype,
        )
    return y


def _rows_of(offsets: torch.Tensor, rows: int) -> list[tuple[int, slice]]:
    """(expert, its rows); the first is always there, so that its weight is checked."""
    ends = offsets.tolist()
    check_offset_values(ends, rows)
    starts = [0, *ends[:-1]]
    return [
        (expert, slice(start, end))
        for expert, (start, end) in enumerate(zip(starts, ends, strict=True))
        if start < end or expert == 0
    ]
