"""Messages of a quantized reduction: native against reference and against numpy, block by block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.ops.reference import block_quantize as reference
from ds_compress.ops.sizes import payload_bytes
from tests.native.elementwise import (
    FLOATS,
    LENGTHS,
    Fakes,
    native_ops,
    random_bytes,
    random_values,
    same,
)

formats = st.tuples(st.sampled_from([8, 4]), st.sampled_from([32, 64, 96, 512]))
seeds = st.integers(0, 2**31)
dtypes = st.sampled_from(FLOATS)


def hard_values(numel: int, dtype: torch.dtype, seed: int, specials: float) -> torch.Tensor:
    """Values with stretches of zeros, of tiny, subnormal and huge numbers; the data begins at any address."""
    generator = torch.Generator().manual_seed(seed)
    values = random_values(numel, torch.float32, seed, specials)
    sizes = torch.tensor([1.0, 1e-3, 0.0, 1e-37, 1e-40, 1e38])
    stretches = sizes[torch.randint(len(sizes), (numel // 100 + 1,), generator=generator)]
    scaled = (values * stretches.repeat_interleave(100)[:numel]).to(dtype)
    return torch.cat((torch.zeros(seed % 7, dtype=dtype), scaled))[seed % 7 :]


def empty_payloads(count: int, numel: int, bits: int, block: int) -> torch.Tensor:
    """Full of garbage, at an odd address: every byte has to be written."""
    size = payload_bytes(numel, bits, block)
    return torch.full((count * size + 1,), 0xA5, dtype=torch.uint8)[1:].view(count, size)


def quantized(
    ops: Any, x: torch.Tensor, residual: torch.Tensor | None, parts: int, bits: int, block: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    chunk = -(-x.numel() // parts)
    payloads = empty_payloads(parts, chunk, bits, block)
    residual = None if residual is None else residual.clone()
    ops.block_quantize(x, payloads, residual, chunk, bits, block)
    return payloads, residual


# --- the formulas again, in numpy ---------------------------------------------------------------------------------


def codes_of(payload: np.ndarray, blocks: int, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    scales = payload[: 4 * blocks].copy().view(np.float32)
    octets = payload[4 * blocks :]
    if bits == 8:
        return scales, octets.view(np.int8).reshape(blocks, block)
    nibbles = np.stack((octets & 15, octets >> 4), axis=1).reshape(-1).astype(np.int8)
    return scales, np.where(nibbles > 7, nibbles - 16, nibbles).astype(np.int8).reshape(blocks, block)


def check_payload(
    values: np.ndarray,
    residual: np.ndarray | None,
    payload: np.ndarray,
    after: np.ndarray | None,
    bits: int,
    block: int,
) -> None:
    """One payload against a loop over its blocks."""
    largest = np.float32(127 if bits == 8 else 7)
    blocks = -(-values.size // block)
    scales, codes = codes_of(payload, blocks, bits, block)
    for index in range(blocks):
        place = slice(index * block, min((index + 1) * block, values.size))
        wanted = values[place] if residual is None else values[place] + residual[place]
        mine = codes[index, : wanted.size].astype(np.float32)
        assert not codes[index, wanted.size :].any()
        if not np.isfinite(wanted).all():
            assert np.isnan(scales[index]) and not mine.any()
            assert (
                after is None
                or residual is None
                or np.array_equal(after[place], residual[place], equal_nan=True)
            )
            continue
        scale = np.abs(wanted).max() / largest
        if scale < np.float32(2.0**-126):
            scale = np.float32(0)
            assert not mine.any()
        else:
            assert np.array_equal(mine, np.clip(np.rint(wanted / scale), -largest, largest))
        assert scales[index] == scale
        if after is not None:
            assert np.array_equal(after[place], wanted - mine * scale)


# --- quantize and read back ----------------------------------------------------------------------------------------


@given(
    numel=st.integers(0, 1200),
    parts=st.integers(1, 4),
    form=formats,
    dtype=dtypes,
    with_residual=st.booleans(),
    specials=st.sampled_from([0.0, 0.002]),
    seed=seeds,
)
def test_quantize_and_dequantize(
    numel: int,
    parts: int,
    form: tuple[int, int],
    dtype: torch.dtype,
    with_residual: bool,
    specials: float,
    seed: int,
) -> None:
    bits, block = form
    x = hard_values(numel, dtype, seed, specials)
    residual = hard_values(numel, torch.float32, seed + 1, 0.0) if with_residual else None
    payloads, after = quantized(native_ops(), x, residual, parts, bits, block)
    expected, expected_after = quantized(reference, x, residual, parts, bits, block)
    assert same(payloads, expected)
    assert after is None or (expected_after is not None and same(after, expected_after))

    chunk = -(-numel // parts)
    padded = np.zeros(chunk * parts, np.float32)
    padded[:numel] = x.float().numpy()
    before, now = np.zeros_like(padded), np.zeros_like(padded)
    if residual is not None and after is not None:
        before[:numel], now[:numel] = residual.numpy(), after.numpy()
    for row in range(parts):
        part = slice(row * chunk, (row + 1) * chunk)
        rest = (before[part], now[part]) if with_residual else (None, None)
        check_payload(padded[part], rest[0], payloads[row].numpy(), rest[1], bits, block)

    out, wanted = torch.empty_like(x), torch.empty_like(x)
    native_ops().block_dequantize(payloads, out, chunk, bits, block)
    reference.block_dequantize(payloads, wanted, chunk, bits, block)
    assert same(out, wanted)


@pytest.mark.parametrize("bits", (8, 4))
@pytest.mark.parametrize("numel", LENGTHS)
def test_hard_lengths(numel: int, bits: int) -> None:
    for dtype in FLOATS:
        for block in (32, 128, 512, 8192):
            x = hard_values(numel, dtype, numel, specials=1e-4)
            residual = random_values(numel, torch.float32, 3) * 1e-3
            payloads, after = quantized(native_ops(), x, residual, 1, bits, block)
            expected, expected_after = quantized(reference, x, residual, 1, bits, block)
            assert same(payloads, expected) and after is not None and expected_after is not None
            assert same(after, expected_after)
            out, wanted = torch.empty_like(x), torch.empty_like(x)
            native_ops().block_dequantize(payloads, out, numel, bits, block)
            reference.block_dequantize(payloads, wanted, numel, bits, block)
            assert same(out, wanted)


def test_fewer_elements_than_payloads() -> None:
    for numel, chunk in ((0, 0), (0, 40), (1, 40), (45, 40)):
        x = random_values(numel, torch.float32, 1)
        payloads = empty_payloads(5, chunk, 8, 32)
        native_ops().block_quantize(x, payloads, None, chunk, 8, 32)
        expected = empty_payloads(5, chunk, 8, 32)
        reference.block_quantize(x, expected, None, chunk, 8, 32)
        assert same(payloads, expected)
        if chunk:
            assert not payloads[2:].any()


@pytest.mark.parametrize("bits", (8, 4))
def test_nothing_beyond_the_end_is_written(bits: int) -> None:
    for numel in (1, 31, 33, 500):
        whole = torch.full((numel + 64,), 5.0)
        residual = torch.full((numel + 64,), 0.25)
        payloads = empty_payloads(1, numel, bits, 64)
        native_ops().block_quantize(whole[:numel], payloads, residual[:numel], numel, bits, 64)
        native_ops().block_dequantize(payloads, whole[:numel], numel, bits, 64)
        assert (whole[numel:] == 5.0).all() and (residual[numel:] == 0.25).all()


def test_overflow_leaves_the_residual_alone() -> None:
    for bad in (math.nan, math.inf, 3e38):
        x = random_values(96, torch.float32, 1)
        residual = random_values(96, torch.float32, 2)
        x[40] = bad
        residual[40] = 3e38  # 3e38 + 3e38 overflows
        before = residual.clone()
        payloads, after = quantized(native_ops(), x, residual, 1, 8, 32)
        assert after is not None and same(after[32:64], before[32:64])
        assert not same(after[:32], before[:32]) and not same(after[64:], before[64:])
        out = torch.empty(96)
        native_ops().block_dequantize(payloads, out, 96, 8, 32)
        assert out[32:64].isnan().all() and out[:32].isfinite().all() and out[64:].isfinite().all()


def test_int4_puts_the_even_element_in_the_low_nibble() -> None:
    x = torch.tensor([7.0, -7.0, 1.0, -1.0] + [0.0] * 28)
    payloads, _ = quantized(native_ops(), x, None, 1, 4, 32)
    assert payloads[0, 4:7].tolist() == [0x97, 0xF1, 0x00]


# --- add up -------------------------------------------------------------------------------------------------------


def random_payloads(
    count: int, numel: int, bits: int, block: int, seed: int, specials: float
) -> torch.Tensor:
    """Any codes, -128 and -8 included; scales of any size, some zero, some NaN."""
    size = payload_bytes(numel, bits, block)
    blocks = -(-numel // block)
    payloads = random_bytes(count * size + 1, seed)[1:].view(count, size)
    scales = random_values(count * blocks, torch.float32, seed).abs() * 1e-2
    chosen = torch.rand(scales.shape, generator=torch.Generator().manual_seed(seed)) < specials
    scales = torch.where(chosen, math.nan, scales)
    payloads[:, : 4 * blocks] = scales.view(torch.uint8).view(count, -1)
    return payloads


@given(
    numel=st.integers(0, 1200),
    count=st.integers(1, 5),
    form=formats,
    multiplier=st.sampled_from([1.0, 0.25, 1 / 3, -0.5]),
    with_residual=st.booleans(),
    specials=st.sampled_from([0.0, 0.05]),
    seed=seeds,
)
def test_reduce(
    numel: int,
    count: int,
    form: tuple[int, int],
    multiplier: float,
    with_residual: bool,
    specials: float,
    seed: int,
) -> None:
    bits, block = form
    payloads = random_payloads(count, numel, bits, block, seed, specials)
    out, wanted = torch.empty(numel), torch.empty(numel)
    native_ops().block_reduce(payloads, out, bits, block, multiplier)
    reference.block_reduce(payloads, wanted, bits, block, multiplier)
    assert same(out, wanted)

    blocks = -(-numel // block)
    total: np.ndarray | None = None
    for payload in payloads.numpy():
        scales, codes = codes_of(payload, blocks, bits, block)
        product = codes.astype(np.float32) * (scales * np.float32(multiplier))[:, None]
        total = product if total is None else total + product
    assert total is not None
    assert same(out, torch.from_numpy(total.reshape(-1)[:numel].copy()))

    residual = random_values(numel, torch.float32, seed + 1) * 1e-2 if with_residual else None
    after, expected_after = (None if residual is None else residual.clone() for _ in range(2))
    payload, expected = (empty_payloads(1, numel, bits, block)[0] for _ in range(2))
    native_ops().block_reduce_quantize(payloads, payload, after, numel, bits, block, multiplier)
    reference.block_reduce_quantize(payloads, expected, expected_after, numel, bits, block, multiplier)
    assert same(payload, expected)
    assert after is None or (expected_after is not None and same(after, expected_after))
    check_payload(
        out.numpy(),
        None if residual is None else residual.numpy(),
        payload.numpy(),
        None if after is None else after.numpy(),
        bits,
        block,
    )


def test_threads_do_not_change_the_result() -> None:
    numel = 300_007
    x = random_values(numel, torch.float32, 1)
    payloads = random_payloads(2, numel, 8, 512, 2, 0.001)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            sent, residual = quantized(native_ops(), x, x * 1e-3, 3, 4, 128)
            out, back = torch.empty(numel), torch.empty(numel)
            native_ops().block_reduce(payloads, out, 8, 512, 0.5)
            native_ops().block_dequantize(sent, back, -(-numel // 3), 4, 128)
            payload = empty_payloads(1, numel, 8, 512)[0]
            native_ops().block_reduce_quantize(payloads, payload, out.clone(), numel, 8, 512, 0.5)
            results.append([sent, residual, out, back, payload])
        finally:
            torch.set_num_threads(1)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


# --- refusals -----------------------------------------------------------------------------------------------------

X, PAYLOADS, OUT = torch.ones(40), torch.zeros(1, 72, dtype=torch.uint8), torch.ones(40)
BAD_CALLS = {
    "bits is 8 or 4, got 2": lambda ops: ops.block_quantize(X, PAYLOADS, None, 40, 2, 32),
    "block is a multiple of 32 up to 8192, got 48": lambda ops: ops.block_quantize(
        X, PAYLOADS, None, 40, 8, 48
    ),
    "got 16384": lambda ops: ops.block_reduce(PAYLOADS, OUT, 8, 16384, 1.0),
    "x is float32, bfloat16, float16": lambda ops: ops.block_quantize(X.double(), PAYLOADS, None, 40, 8, 32),
    "has 108 bytes, got rows of 72": lambda ops: ops.block_quantize(X, PAYLOADS, None, 96, 8, 32),
    "do not hold 40": lambda ops: ops.block_dequantize(PAYLOADS[:0], OUT, 40, 8, 32),
    "residual has 39 elements": lambda ops: ops.block_quantize(X, PAYLOADS, X[1:].clone(), 40, 8, 32),
    "residual is float32": lambda ops: ops.block_quantize(X, PAYLOADS, X.half(), 40, 8, 32),
    "no payload to add up": lambda ops: ops.block_reduce(PAYLOADS[:0], OUT, 8, 32, 1.0),
    "out is float32": lambda ops: ops.block_reduce(PAYLOADS, OUT.half(), 8, 32, 1.0),
    "payload has 71 bytes": lambda ops: ops.block_reduce_quantize(
        PAYLOADS, PAYLOADS[0, 1:].clone(), None, 40, 8, 32, 1.0
    ),
    "contiguous tensor of 1 dimensions": lambda ops: ops.block_dequantize(
        PAYLOADS, OUT.view(4, 10), 40, 8, 32
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_are_refused_alike(message: str) -> None:
    for ops in (native_ops(), reference, Fakes()):
        with pytest.raises(ValueError, match=message):
            BAD_CALLS[message](ops)
