"""Floats of 4 to 8 bits and their scales: against compressed_tensors 0.20, torch's float8 types, and by enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.quant_args import QuantizationArgs
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.ops.reference.float_formats import (
    E2M1,
    E2M3,
    E4M3,
    E5M2,
    FLOAT_FORMATS,
    FloatFormat,
    ScaleKind,
    block_scale,
    decode,
    e4m3_scale,
    encode,
    global_scale_of,
    power_of_two,
    round_to_format,
    scale_exponent,
)

MX = {"MXFP4": E2M1, "MXFP6A16": E2M3, "MXFP8": E4M3}
FORMATS = [pytest.param(number, id=number.name) for number in FLOAT_FORMATS.values()]


def scheme(name: str) -> QuantizationArgs:
    weights = preset_name_to_scheme(name, ["Linear"]).weights
    assert weights is not None
    return weights


def hard_blocks(size: int, seed: int = 0) -> torch.Tensor:
    """(4000, size): random, tiny, zero, subnormal, huge blocks, on the numbers and ties of a grid, of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, size, generator=generator)
    x = x * torch.exp(torch.randn(4000, 1, generator=generator) * 8)
    x[:100] *= 1e-38
    x[100:200] = 0
    x[200:300] *= 1e-42
    signs = torch.randn(100, size, generator=generator).sign()
    x[300:400] = signs * 2.9e38 * torch.rand(100, 1, generator=generator)
    x[400:500] = torch.randint(-8, 9, (100, size), generator=generator) * 0.25
    x[500:600] = torch.randint(-8, 9, (100, size), generator=generator) * 2.0**-133
    x[600:1000] *= torch.exp2(-20 * torch.rand(400, size, generator=generator))
    return x


def magnitudes_of(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.abs().amax(1)


def codes_of(blocks: torch.Tensor, scale: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    return round_to_format(blocks / scale[:, None], number).clamp_(-number.largest, number.largest)


def check_codes(mine: torch.Tensor, theirs: torch.Tensor, number: FloatFormat) -> None:
    """Equal numbers; among them is every number that the format has, with both zeros."""
    assert torch.equal(mine, theirs)
    codes = encode(mine, number)
    assert torch.equal(decode(codes, number), mine)
    possible = decode(torch.arange(2**number.bits).to(torch.uint8), number).abs() <= number.largest
    assert torch.equal(codes.unique().long(), possible.nonzero().view(-1))


# --- compressed_tensors ------------------------------------------------------------------------------------------


def overflows_there(amax: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """Whether the mantissa of a finite amax is rounded up to 2^128, which compressed_tensors turns into an Inf."""
    half_step = 1 << (23 - number.scale_rounding_bits - 1)
    return amax.view(torch.int32) + half_step >= torch.tensor(math.inf).view(torch.int32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MX)
def test_mx_blocks(name: str, seed: int) -> None:
    arguments, number = scheme(name), MX[name]
    x = hard_blocks(32, seed)
    x = x[~overflows_there(magnitudes_of(x), number)]
    theirs, _ = calculate_qparams(x.amin(1), x.amax(1), arguments)
    mine = block_scale(magnitudes_of(x), number, ScaleKind.E8M0)
    assert torch.equal(mine, theirs)
    check_codes(codes_of(x, mine, number), quantize(x, theirs.view(-1, 1), None, arguments), number)


@pytest.mark.parametrize("name", MX)
def test_the_largest_blocks_are_infinite_there_and_finite_here(name: str) -> None:
    number = MX[name]
    amax = torch.linspace(1.0, 2.0, 257)[:-1] * 2.0**127
    theirs, _ = calculate_qparams(-amax, amax, scheme(name))
    mine = block_scale(amax, number, ScaleKind.E8M0)
    beyond = overflows_there(amax, number)
    assert torch.equal(theirs.isinf(), beyond) and beyond.any()
    assert torch.equal(mine[~beyond], theirs[~beyond])
    assert (mine[beyond] == 2.0 ** (128 - number.largest_exponent)).all()
    if name == "MXFP4":
        assert amax[beyond][0] == 1.75 * 2.0**127


def nvfp4_tensors(seed: int) -> dict[str, torch.Tensor]:
    x = hard_blocks(16, seed)[1000:]
    return {
        "random": torch.randn(4000, 16, generator=torch.Generator().manual_seed(seed)),
        "of many sizes": x,
        "with blocks that E4M3 loses": torch.cat([x, x[:50] * 1e-9, torch.zeros(3, 16)]),
        "zero": torch.zeros(5, 16),
        "subnormal": hard_blocks(16, seed)[200:300],
    }


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("which", list(nvfp4_tensors(0)))
def test_nvfp4_blocks(which: str, seed: int) -> None:
    arguments, x = scheme("NVFP4"), nvfp4_tensors(seed)[which]
    wanted = generate_gparam(x.min(), x.max())
    assert torch.equal(global_scale_of(x.abs().amax(), E2M1).view(1), wanted)
    theirs, _ = calculate_qparams(x.amin(1), x.amax(1), arguments, global_scale=wanted)
    assert torch.equal(e4m3_scale(magnitudes_of(x), E2M1, wanted), theirs)
    scale = block_scale(magnitudes_of(x), E2M1, ScaleKind.E4M3, wanted)
    mine = codes_of(x, scale, E2M1)
    codes = quantize(x, theirs.view(-1, 1), None, arguments, global_scale=wanted)
    if which == "random":
        check_codes(mine, codes, E2M1)
    assert torch.equal(mine, codes)


@pytest.mark.parametrize("seed", range(3))
def test_fp8_rows(seed: int) -> None:
    arguments, x = scheme("FP8_DYNAMIC"), hard_blocks(64, seed)
    theirs, _ = calculate_qparams(x.amin(1, keepdim=True), x.amax(1, keepdim=True), arguments)
    mine = block_scale(magnitudes_of(x), E4M3, ScaleKind.FP32)
    assert torch.equal(mine, theirs.view(-1))
    check_codes(codes_of(x, mine, E4M3), quantize(x, theirs, None, arguments), E4M3)


@pytest.mark.parametrize("size", [1.0, 0.0, 1e-41, 1e-30, 5e37])
def test_an_fp8_tensor(size: float) -> None:
    arguments, x = scheme("FP8"), torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * size
    theirs, _ = calculate_qparams(x.min(), x.max(), arguments)
    mine = block_scale(x.abs().amax().view(1), E4M3, ScaleKind.FP32)
    assert torch.equal(mine, theirs)
    assert torch.equal(
        codes_of(x.view(1, -1), mine, E4M3).view(x.shape), quantize(x, theirs, None, arguments)
    )


def test_fp8_blocks() -> None:
    arguments = scheme("FP8_BLOCK")
    x = hard_blocks(128 * 128)[598:604].view(3, 2, 128, 128)
    x = torch.cat([x, torch.randn(3, 2, 128, 128, generator=torch.Generator().manual_seed(1))])
    flat = x.reshape(12, -1)
    theirs, _ = calculate_qparams(flat.amin(1).view(6, 2), flat.amax(1).view(6, 2), arguments)
    mine = block_scale(magnitudes_of(flat), E4M3, ScaleKind.FP32)
    assert torch.equal(mine.view(6, 2), theirs)
    whole = x.permute(0, 2, 1, 3).reshape(6 * 128, 2 * 128)
    codes = quantize(whole, theirs, None, arguments).view(6, 128, 2, 128).permute(0, 2, 1, 3).reshape(12, -1)
    check_codes(codes_of(flat, mine, E4M3), codes, E4M3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", list(ScaleKind))
@pytest.mark.parametrize("number", FORMATS)
def test_a_block_that_is_not_finite_has_a_scale_that_says_so(
    number: FloatFormat, kind: ScaleKind, bad: float
) -> None:
    amax = torch.tensor([1.0, bad, 2.0])
    assert block_scale(amax, number, kind, torch.ones(1)).isnan().tolist() == [False, True, False]
    assert global_scale_of(torch.tensor(bad), number).isnan()


def test_scales_in_e4m3_need_a_global_one() -> None:
    with pytest.raises(ValueError, match="need a global scale"):
        block_scale(torch.ones(1), E2M1, ScaleKind.E4M3)


# --- scales by their definition ----------------------------------------------------------------------------------


@given(
    number=st.sampled_from(list(FLOAT_FORMATS.values())),
    amax=st.floats(2.0**-100, 2.0**100, width=32),
)
def test_an_amax_fills_its_format(number: FloatFormat, amax: float) -> None:
    """It does not saturate, and by half the power of two it would (in E4M3 448 itself would not)."""
    largest = torch.tensor([amax])
    scale = block_scale(largest, number, ScaleKind.E8M0)
    reached = float(round_to_format(largest / scale, number))
    again = float(round_to_format(largest / scale * 2, number))
    assert reached <= number.largest <= again
    assert number == E4M3 or number.largest < again
    assert float(scale) == 2.0 ** int(scale_exponent(largest, number))


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-149, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in exponents.tolist()]


# --- numbers -----------------------------------------------------------------------------------------------------


def spread(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * torch.exp(torch.randn(count, generator=generator) * 5)
    return torch.cat([x, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38])])


def by_enumeration(values: torch.Tensor, number: FloatFormat) -> torch.Tensor:
    """The nearest of all numbers; of two as near, that of the even code."""
    magnitudes = decode(torch.arange(2 ** (number.bits - 1)).to(torch.uint8), number).double()
    distance = (values.double().abs()[:, None] - magnitudes).abs()
    odd = torch.arange(len(magnitudes)) % 2
    # Distances are exact in fp64 here, so that odd codes may be put behind even ones by less than any difference.
    ties = distance == distance.amin(1, keepdim=True)
    nearest = torch.where(ties, odd, 2).argmin(1)
    return torch.copysign(magnitudes[nearest], values.double()).float()


@pytest.mark.parametrize("number", FORMATS)
def test_the_nearest_number(number: FloatFormat) -> None:
    middles = decode(torch.arange(2 ** (number.bits - 1) - 1).to(torch.uint8), number)
    middles = torch.cat([middles, (middles[1:] + middles[:-1]) / 2])
    x = torch.cat([spread(20000, 1), middles, -middles, middles.nextafter(torch.tensor(math.inf))])
    x = x.clamp(-number.largest, number.largest)
    mine = round_to_format(x, number)
    assert torch.equal(mine, by_enumeration(x, number))
    assert torch.equal(mine.signbit(), x.signbit())
    assert torch.equal(round_to_format(x.double(), number), mine.double())


@pytest.mark.parametrize(("number", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_the_casts_of_torch(number: FloatFormat, dtype: torch.dtype) -> None:
    x = spread(200000, 2).clamp_(-number.largest, number.largest)
    mine = round_to_format(x, number)
    assert torch.equal(mine, x.to(dtype).float())
    assert torch.equal(encode(mine, number), x.to(dtype).view(torch.uint8))


@pytest.mark.parametrize("number", FORMATS)
def test_codes_and_numbers_are_each_other_s_inverse(number: FloatFormat) -> None:
    codes = torch.arange(2**number.bits).to(torch.uint8)
    values = decode(codes, number)
    finite = values.abs() <= number.largest
    assert values[finite].abs().amax() == number.largest
    assert len(values[finite].unique()) == int(finite.sum()) - 1  # of two zeros, one
    assert torch.equal(encode(values[finite], number), codes[finite])
    assert torch.equal(round_to_format(values[finite], number), values[finite])


@pytest.mark.parametrize("number", FORMATS)
def test_what_is_beyond_the_format_keeps_its_size(number: FloatFormat) -> None:
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, math.nan])
    rounded = round_to_format(x, number)
    assert rounded[2:4].tolist() == [math.inf, -math.inf] and rounded[4].isnan()
    assert ((rounded[:2] / x[:2] - 1).abs() <= 2.0 ** -(number.mantissa_bits + 1)).all()


# --- stochastic rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", FORMATS)
def test_stochastic_rounding_leaves_numbers_as_they_are(number: FloatFormat) -> None:
    values = decode(torch.arange(2**number.bits).to(torch.uint8), number)
    values = values[values.abs() <= number.largest]
    for noise in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        assert torch.equal(
            round_to_format(values.double(), number, torch.full_like(values.double(), noise)), values.double()
        )


@pytest.mark.parametrize("number", FORMATS)
def test_stochastic_rounding_goes_to_a_neighbour_and_has_the_right_mean(number: FloatFormat) -> None:
    generator = torch.Generator().manual_seed(3)
    x = (torch.rand(64, generator=generator) * 2 - 1) * number.largest / 2
    x[:16] *= 2.0**-6
    draws = 20000
    noise = torch.rand(64, draws, generator=generator, dtype=torch.float64)
    values = x.double()[:, None].expand(64, draws)
    rounded = round_to_format(values, number, noise)
    low = round_to_format(x.double(), number, torch.zeros(64, dtype=torch.float64))
    high = round_to_format(
        x.double(), number, torch.full((64,), math.nextafter(1.0, 0.0), dtype=torch.float64)
    )
    assert ((rounded == low[:, None]) | (rounded == high[:, None])).all()
    deviation = ((x.double() - low) * (high - x.double()) / draws).sqrt()
    assert ((rounded.mean(1) - x.double()).abs() <= 5 * deviation + 1e-12).all()


# --- fp64 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(ScaleKind))
@pytest.mark.parametrize("number", FORMATS)
def test_fp64_gives_fp64(number: FloatFormat, kind: ScaleKind) -> None:
    amax = torch.rand(100, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 10
    wanted = torch.full((1,), 300.0)
    scale = block_scale(amax, number, kind, wanted.double())
    narrow = block_scale(amax.float(), number, kind, wanted)
    assert scale.dtype == torch.float64
    torch.testing.assert_close(scale.float(), narrow, rtol=2e-7, atol=0)
    if kind is ScaleKind.E8M0:
        assert torch.equal(scale.float(), narrow)
