"""Hard blocks for fake quantization to small floats, and how the native op is held against the reference on them."""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.ops.reference import fake_quantize_float as reference
from ds_compress.ops.reference.float_formats import (
    FLOAT_FORMATS,
    FloatFormat,
    ScaleKind,
    global_scale_of,
)
from tests.native.elementwise import random_values, same

FORMATS = list(FLOAT_FORMATS.values())
KINDS = list(ScaleKind)


def arguments_of(number: FloatFormat, kind: ScaleKind, block: int) -> dict[str, Any]:
    return {
        "exponent_bits": number.exponent_bits,
        "mantissa_bits": number.mantissa_bits,
        "largest": number.largest,
        "scale_kind": int(kind),
        "block": block,
    }


def hard_blocks(
    rows: int,
    columns: int,
    block: int,
    dtype: torch.dtype,
    seed: int,
    specials: float = 0.003,
    offset: int = 0,
) -> torch.Tensor:
    """Blocks of very different size; some zero, subnormal, up to the largest float of the dtype, on numbers and ties of
    a grid, or with a value that is not finite. The data begins `offset` elements into its allocation."""
    generator = torch.Generator().manual_seed(seed)
    blocks = random_values(rows * columns, torch.float32, seed, specials).view(-1, block)
    shape = (len(blocks), 1)
    sizes = torch.tensor([1.0, 1e-3, 300.0, 1e-30, 1e-38, 1e-41, 0.0, 3e37])
    x = blocks * sizes[torch.randint(len(sizes), shape, generator=generator)]
    ties = torch.randint(-32, 33, blocks.shape, generator=generator) * 0.25
    ties *= torch.exp2(torch.randint(-140, 120, shape, generator=generator).float())
    x = torch.where(torch.rand(shape, generator=generator) < 0.3, ties, x)
    largest = torch.finfo(dtype).max
    ends = torch.where(blocks > 0, largest, -largest) * torch.rand(blocks.shape, generator=generator)
    x = torch.where(torch.rand(shape, generator=generator) < 0.1, ends, x)
    return torch.cat([torch.zeros(offset), x.view(-1)]).to(dtype)[offset:].view(rows, columns)


def global_scale_for(x: torch.Tensor, number: FloatFormat, kind: ScaleKind) -> torch.Tensor | None:
    if kind is not ScaleKind.E4M3:
        return None
    magnitudes = x.float().abs().nan_to_num(0.0, 0.0)
    return global_scale_of(magnitudes.amax() if x.numel() else torch.tensor(1.0), number).view(1)


def equal_results(ops: Any, x: torch.Tensor, *scales: torch.Tensor | None, **arguments: Any) -> bool:
    mine = ops.fake_quantize_float(x, *scales, **arguments)
    theirs = reference.fake_quantize_float(x, *scales, **arguments)
    return all(same(a, b) for a, b in zip(mine, theirs, strict=True))
