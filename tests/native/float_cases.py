"""Launches of the CUDA kernels of fake_quantize_float, and what they must give."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch

from ds_compress.ops.reference import fake_quantize_float as reference
from ds_compress.ops.reference.float_formats import FloatFormat, ScaleKind
from tests.native.elementwise import FLOATS, random_values
from tests.native.float_values import (
    FORMATS,
    KINDS,
    arguments_of,
    global_scale_for,
    hard_blocks,
)
from tests.native.programs import DTYPE_NUMBER, Case, program, shifted

# (blocks, values of each): in vectors of neighbouring lanes, in registers of a warp or more; odd ones; long ones.
SHAPES = [
    (0, 16),
    (37, 8),
    (150, 16),
    (67, 32),
    (70, 128),
    (9, 256),
    (13, 51),
    (40, 3),
    (5, 24),
    (3, 96),
    (7, 400),
    (2, 1500),
    (1, 1504),
    (2, 4096),
    (1, 9000),
    (1, 16384),
    (1, 16500),
    (2, 17001),
    (2, 33000),
]


def launch_of(
    x: torch.Tensor,
    number: FloatFormat,
    kind: ScaleKind,
    given: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    with_mask: bool = True,
    off: int = 0,
) -> Case:
    """The blocks are the rows of x, which with its result begins `off` elements after an aligned address."""
    blocks, block = x.shape
    y, scale, kept = reference.fake_quantize_float(
        x, given, global_scale, **arguments_of(number, kind, block), with_mask=with_mask
    )
    size = x.element_size()
    inputs = {"x": shifted(x.view(-1), off), "y": torch.full((off + x.numel(),), 7, dtype=x.dtype)}
    inputs |= {} if given is None else {"scale": given}
    inputs |= {} if global_scale is None else {"global": global_scale}
    form = (number.exponent_bits, number.mantissa_bits, number.largest, int(kind))
    scales = blocks if given is None else given.numel()
    arguments = (DTYPE_NUMBER[x.dtype], blocks, block, int(given is not None), scales, "scale")
    call = (
        f"x+{off * size}",
        f"y+{off * size}",
        *arguments,
        "global" if global_scale is not None else None,
        *form,
    )
    expected = {"y": shifted(y.view(-1), off), "scale": scale}
    return program(
        inputs,
        [("dsc_fake_quantize_float", (*call, "kept" if with_mask else None, None))],
        expected | ({"kept": kept} if with_mask else {}),
    )


def float_cases() -> Iterator[Case]:
    for seed, ((blocks, block), dtype, number) in enumerate(product(SHAPES, FLOATS, FORMATS)):
        kind = KINDS[(seed + seed // 15) % 3]  # others for every shape
        x = hard_blocks(blocks, block, block, dtype, seed, specials=0.1 / block)
        off = 3 * (seed % 7 == 6)
        keep = seed % 4 != 3
        yield launch_of(x, number, kind, None, global_scale_for(x, number, kind), keep, off)
        for count in {1, blocks} - {0}:
            given = random_values(count, torch.float32, seed, specials=0.2).view(-1, 1) * 0.02
            yield launch_of(x, number, kind, given, None, keep, off)
