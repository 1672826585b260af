"""Fused fake quantization to small floats: native against reference, bit for bit, and against numbers by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.ops.reference import fake_quantize_float as reference
from ds_compress.ops.reference.float_formats import E2M1, E5M2, FloatFormat, ScaleKind
from tests.native.elementwise import FLOATS, Fakes, native_ops, random_values
from tests.native.float_values import (
    FORMATS,
    KINDS,
    arguments_of,
    equal_results,
    global_scale_for,
    hard_blocks,
)

seeds = st.integers(0, 2**31)
formats, kinds, dtypes = st.sampled_from(FORMATS), st.sampled_from(KINDS), st.sampled_from(FLOATS)


# --- scales chosen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", FORMATS, ids=lambda number: number.name)
def test_chosen_scales(number: FloatFormat, kind: ScaleKind, dtype: torch.dtype) -> None:
    shapes = ((37, 64, 16), (9, 96, 32), (5, 256, 128), (3, 640, 640), (13, 51, 17), (64, 3, 1), (0, 4, 2))
    for seed, (rows, columns, block) in enumerate((*shapes, (5, 0, 3), (7, 40, 8), (6, 1000, 500))):
        x = hard_blocks(rows, columns, block, dtype, seed)
        for keep in (True, False):
            arguments = arguments_of(number, kind, block) | {"with_mask": keep}
            assert equal_results(native_ops(), x, None, global_scale_for(x, number, kind), **arguments)


@given(
    rows=st.integers(0, 20),
    blocks=st.integers(0, 20),
    block=st.integers(1, 70) | st.sampled_from((16, 32, 128, 300)),
    seed=seeds,
    number=formats,
    kind=kinds,
    dtype=dtypes,
    keep=st.booleans(),
)
def test_any_block(
    rows: int,
    blocks: int,
    block: int,
    seed: int,
    number: FloatFormat,
    kind: ScaleKind,
    dtype: torch.dtype,
    keep: bool,
) -> None:
    x = hard_blocks(rows, blocks * block, block, dtype, seed, offset=seed % 4)
    arguments = arguments_of(number, kind, block) | {"with_mask": keep}
    assert equal_results(native_ops(), x, None, global_scale_for(x, number, kind), **arguments)


@given(seed=seeds, number=formats, kind=kinds, low=st.integers(-149, 120), wide=st.floats(1e-3, 1e5))
def test_scales_of_any_magnitude(
    seed: int, number: FloatFormat, kind: ScaleKind, low: int, wide: float
) -> None:
    """Every block has a size of its own between subnormal and the largest float; global scales that saturate, too."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(low + 16 * torch.rand(256, 1, generator=generator, dtype=torch.float64))
    x = (torch.randn(256, 16, generator=generator).double() * sizes).float()
    wanted = global_scale_for(x, number, kind)
    wanted = None if wanted is None else (wanted * wide).clamp_(1e-45, 3e38)
    assert equal_results(native_ops(), x, None, wanted, **arguments_of(number, kind, 16), with_mask=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", (32768, 32769, 100001, 65543))
def test_long_blocks_are_cut_into_pieces(columns: int, kind: ScaleKind) -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            for seed, rows in ((1, 3), (2, 1)):
                x = random_values(rows * columns, torch.float32, seed).view(rows, columns)
                x[0, columns - 1] = 7.0
                if rows > 1:
                    x[1, columns - 2] = math.nan
                arguments = arguments_of(E2M1, kind, columns) | {"with_mask": True}
                assert equal_results(native_ops(), x, None, global_scale_for(x, E2M1, kind), **arguments)
        finally:
            torch.set_num_threads(1)


def test_threads_share_blocks_and_no_byte_of_the_mask() -> None:
    """Everything is kept, so that every bit that a thread takes from another is seen."""
    torch.set_num_threads(2)
    try:
        for block in (3, 16, 32, 299, 300, 301, 511, 1001, 3333, 9999):
            rows = 200_000 // block
            x = random_values(rows * block, torch.bfloat16, block).view(rows, block)
            arguments = arguments_of(E2M1, ScaleKind.E8M0, block) | {"with_mask": True}
            assert equal_results(native_ops(), x, **arguments)
    finally:
        torch.set_num_threads(1)


@given(
    exponent_bits=st.integers(2, 5),
    mantissa_bits=st.integers(1, 3),
    exponent=st.integers(-30, 15),
    kind=kinds,
    seed=seeds,
    block=st.sampled_from((5, 16, 64)),
    dtype=dtypes,
)
def test_formats_that_nobody_has(
    exponent_bits: int,
    mantissa_bits: int,
    exponent: int,
    kind: ScaleKind,
    seed: int,
    block: int,
    dtype: torch.dtype,
) -> None:
    """A largest number that is none of the format, or so small that scales end at 2^127."""
    number = FloatFormat("", exponent_bits, mantissa_bits, math.ldexp(1 + seed % 64 / 64, exponent))
    x = hard_blocks(16, 4 * block, block, dtype, seed)
    arguments = arguments_of(number, kind, block) | {"with_mask": True}
    assert equal_results(native_ops(), x, None, global_scale_for(x, number, kind), **arguments)


def test_a_bad_value_spoils_its_block_and_no_other() -> None:
    for kind in KINDS:
        for bad in (math.nan, math.inf, -math.inf):
            x = random_values(3 * 64, torch.float32, 1).view(3, 64)
            wanted = global_scale_for(x, E2M1, kind)
            x[1, 18] = bad
            y, scale, bits = native_ops().fake_quantize_float(
                x, None, wanted, **arguments_of(E2M1, kind, 16), with_mask=True
            )
            is_bad = torch.zeros(3, 4, dtype=torch.bool)
            is_bad[1, 1] = True
            assert torch.equal(scale.isnan(), is_bad)
            assert torch.equal(y.isnan(), is_bad.repeat_interleave(16, 1))
            kept = np.unpackbits(bits.numpy(), bitorder="little").reshape(3, 64).astype(bool)
            assert not kept[1, 16:32].any() and kept[[0, 2]].all()


def test_numbers_by_hand() -> None:
    x = torch.tensor(
        [[6.0, -0.7, 2.4, 0.1, 0.25, -0.25, 0.75, -0.0], [0.0, -0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    )
    y, scale, _ = native_ops().fake_quantize_float(
        x, **arguments_of(E2M1, ScaleKind.FP32, 8), with_mask=False
    )
    assert y.tolist() == [[6.0, -0.5, 2.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 8]
    assert torch.equal(y.signbit(), x.signbit())
    assert scale.tolist() == [[1.0], [2.0**-23]]
    # 6.9 rounds to 6 with a saturated 7.1 beside it, for which the next power of two would be chosen.
    given = torch.ones(1, 1)
    x = torch.tensor([[6.9, 7.1, -1e30, math.inf]])
    y, _, bits = native_ops().fake_quantize_float(
        x, given, **arguments_of(E2M1, ScaleKind.E8M0, 4), with_mask=True
    )
    assert y.tolist() == [[6.0, 6.0, -6.0, 6.0]] and bits.tolist() == [0b0001]


# --- scales given ------------------------------------------------------------------------------------------------


@given(
    rows=st.integers(1, 20),
    blocks=st.integers(1, 9),
    block=st.integers(1, 70) | st.sampled_from((16, 32, 128)),
    seed=seeds,
    number=formats,
    kind=kinds,
    dtype=dtypes,
    shared=st.booleans(),
)
def test_given_scales(
    rows: int,
    blocks: int,
    block: int,
    seed: int,
    number: FloatFormat,
    kind: ScaleKind,
    dtype: torch.dtype,
    shared: bool,
) -> None:
    x = hard_blocks(rows, blocks * block, block, dtype, seed, specials=0.1, offset=seed % 4)
    shape = (1, 1) if shared else (rows, blocks)
    # Zero, subnormal, infinite and negative scales, too.
    scale = hard_blocks(shape[0], shape[1], 1, torch.float32, seed + 1, specials=0.2)
    assert equal_results(native_ops(), x, scale, **arguments_of(number, kind, block), with_mask=True)


def test_a_given_scale_saturates_and_a_nan_stays_alone() -> None:
    for columns in (66, 70000):
        x = random_values(4 * columns, torch.float32, 5, specials=0.2).view(4, columns)
        for scale in (torch.full((1, 1), 0.01), torch.full((4, 2), 0.01)):
            arguments = arguments_of(E5M2, ScaleKind.FP32, columns // 2) | {"with_mask": True}
            y, used, _ = native_ops().fake_quantize_float(x, scale, **arguments)
            assert torch.equal(y.isnan(), x.isnan()) and torch.equal(used, scale)
            assert y[x.isinf()].abs().unique().tolist() == [float(np.float32(57344) * np.float32(0.01))]
            assert equal_results(native_ops(), x, scale, **arguments)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_nan_stays_one(dtype: torch.dtype) -> None:
    """Whatever its digits: rounding them must not carry into the sign."""
    for bits in (0x7FFFFFFF, 0x7F800001, -1, 0x7FC0FFFF):
        scale = torch.tensor([[bits]], dtype=torch.int64).to(torch.int32).view(torch.float32)
        for block in (16, 32, 40):
            x = torch.ones(3, block, dtype=dtype)
            arguments = arguments_of(E2M1, ScaleKind.FP32, block) | {"with_mask": True}
            y, _, kept = native_ops().fake_quantize_float(x, scale.expand(3, 1).contiguous(), **arguments)
            assert y.isnan().all() and not kept.any()
            x[1, 5] = scale.view(-1)
            if dtype is not torch.float32:
                x.view(torch.int16)[1, 6] = -1  # every digit of a NaN
            assert equal_results(native_ops(), x, torch.ones(3, 1), **arguments)
            assert equal_results(native_ops(), x, **arguments)


# --- refusals ----------------------------------------------------------------------------------------------------

ONE = torch.ones(1, 1)
BAD_CALLS: dict[str, tuple[torch.Tensor, list[torch.Tensor | None], dict[str, Any]]] = {
    "x is float32": (torch.ones(2, 4, dtype=torch.float64), [], {}),
    "contiguous": (torch.ones(4, 2).t(), [], {}),
    "2 to 5 exponent bits": (torch.ones(2, 4), [], {"exponent_bits": 6}),
    "1 to 3 mantissa bits": (torch.ones(2, 4), [], {"mantissa_bits": 0}),
    "a largest value up to": (torch.ones(2, 4), [], {"largest": 65537.0}),
    "scale_kind is 0, 1 or 2": (torch.ones(2, 4), [], {"scale_kind": 3}),
    "block divides the 4 columns": (torch.ones(2, 4), [], {"block": 3}),
    r"scale is \(2, 2\) or \(1, 1\)": (torch.ones(2, 4), [torch.ones(2, 1)], {}),
    "scale is float32": (torch.ones(2, 4), [ONE.double()], {}),
    "a global_scale belongs": (torch.ones(2, 4), [None, torch.ones(1)], {}),
    "belongs to scales of kind 2": (torch.ones(2, 4), [], {"scale_kind": 2}),
    "global_scale is one number": (torch.ones(2, 4), [None, torch.ones(2)], {"scale_kind": 2}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_are_refused_alike(message: str) -> None:
    x, scales, changed = BAD_CALLS[message]
    arguments = arguments_of(E2M1, ScaleKind.FP32, 2) | {"with_mask": False} | changed
    for ops in (native_ops(), reference, Fakes()):
        with pytest.raises(ValueError, match=message):
            ops.fake_quantize_float(x, *scales, **arguments)
