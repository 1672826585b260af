"""Bit-packed masks and N:M selection: native against reference and against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.ops.reference import mask as reference
from ds_compress.ops.reference import squares as squares_reference
from tests.native.elementwise import (
    LENGTHS,
    Fakes,
    native_ops,
    random_bytes,
    random_values,
    same,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
places = st.tuples(st.integers(0, 700), st.integers(0, 70), st.integers(0, 9))
"""(elements, bit offset, element offset of the data pointer)"""
seeds = st.integers(0, 2**31)


def bits_of(packed: torch.Tensor, numel: int, bit_offset: int) -> torch.Tensor:
    bits = np.unpackbits(packed.numpy(), bitorder="little")[bit_offset : bit_offset + numel]
    return torch.from_numpy(bits.astype(bool))


def mask_for(numel: int, bit_offset: int, seed: int) -> torch.Tensor:
    """A mask that ends with the last byte that is needed, so reading further is reading out of bounds."""
    return random_bytes(-(-(numel + bit_offset) // 8), seed)


# --- apply ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(place=places, seed=seeds, fill=st.sampled_from([0.0, -0.0, -1.5, math.inf, 1e-40]))
def test_apply(dtype: torch.dtype, place: tuple[int, int, int], seed: int, fill: float) -> None:
    numel, bit_offset, offset = place
    packed = mask_for(numel, bit_offset, seed)
    weights = random_values(numel, dtype, seed, specials=0.2, offset=offset)
    before = weights.clone()
    expected = weights.clone()
    reference.mask_apply_(expected, packed, bit_offset, fill)
    native_ops().mask_apply_(weights, packed, bit_offset, fill)
    assert same(weights, expected)
    filled = torch.full_like(before, fill)
    assert same(weights, torch.where(bits_of(packed, numel, bit_offset), before, filled))


@given(sizes=st.lists(places, max_size=12), seed=seeds, fill=st.sampled_from([0.0, -1.5]))
def test_apply_to_many(sizes: list[tuple[int, int, int]], seed: int, fill: float) -> None:
    """Tensors of any dtypes: as one call for each."""
    masks = [mask_for(numel, bit, seed + i) for i, (numel, bit, _) in enumerate(sizes)]
    weights = [
        random_values(numel, DTYPES[(seed + i) % 4], seed + i, specials=0.2, offset=offset)
        for i, (numel, _, offset) in enumerate(sizes)
    ]
    bits = [bit for _, bit, _ in sizes]
    expected = [each.clone() for each in weights]
    for values, packed, bit in zip(expected, masks, bits, strict=True):
        native_ops().mask_apply_(values, packed, bit, fill)
    for apply in (reference.mask_apply_many_, native_ops().mask_apply_many_):
        mine = [each.clone() for each in weights]
        apply(mine, masks, bits, fill)
        assert all(same(a, b) for a, b in zip(mine, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", LENGTHS)
def test_apply_at_hard_lengths(dtype: torch.dtype, numel: int) -> None:
    for bit_offset, offset in ((0, 0), (3, 1), (13, 3)):
        packed = mask_for(numel, bit_offset, numel)
        weights = random_values(numel, dtype, numel, specials=0.3, offset=offset)
        expected = torch.where(bits_of(packed, numel, bit_offset), weights, torch.zeros_like(weights))
        native_ops().mask_apply_(weights, packed, bit_offset)
        assert same(weights, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_outside_the_range_is_touched(dtype: torch.dtype) -> None:
    for numel in (1, 63, 64, 65, 200):
        whole = random_values(numel + 20, dtype, numel)
        before = whole.clone()
        native_ops().mask_apply_(whole[10 : 10 + numel], torch.zeros(numel, dtype=torch.uint8), 5)
        assert same(whole[:10], before[:10]) and same(whole[10 + numel :], before[10 + numel :])
        assert int(torch.count_nonzero(whole[10 : 10 + numel])) == 0


def test_threads_do_not_change_the_result() -> None:
    numel = 300_007
    packed = mask_for(numel, 5, 1)
    scores = random_values(numel, torch.float32, 2).view(1, -1)
    rows = random_values(331 * 907, torch.float32, 3).view(331, 907)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            weights = scores[0].clone()
            native_ops().mask_apply_(weights, packed, 5)
            results.append(
                [
                    weights,
                    native_ops().mask_n_of_m(rows, 2, 4),
                    native_ops().mask_n_of_m(scores[:, :-3], 2, 4),
                    native_ops().mask_pack(scores[0] > 0),
                    native_ops().mask_unpack(packed, numel, 3),
                ]
            )
        finally:
            torch.set_num_threads(1)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


# --- pack and unpack ---------------------------------------------------------------------------------------------


@given(place=places, seed=seeds)
def test_pack_and_unpack(place: tuple[int, int, int], seed: int) -> None:
    numel, bit_offset, offset = place
    packed = mask_for(numel, bit_offset, seed)
    keep = native_ops().mask_unpack(packed, numel, bit_offset)
    assert same(keep, bits_of(packed, numel, bit_offset))
    assert same(keep, reference.mask_unpack(packed, numel, bit_offset))
    moved = torch.cat((torch.zeros(offset, dtype=torch.bool), keep))[offset:]
    again = native_ops().mask_pack(moved)
    assert same(again, torch.from_numpy(np.packbits(keep.numpy(), bitorder="little")))
    assert same(again, reference.mask_pack(moved))


@pytest.mark.parametrize("numel", LENGTHS)
def test_pack_at_hard_lengths(numel: int) -> None:
    keep = random_bytes(numel, numel) < 100
    packed = native_ops().mask_pack(keep)
    assert same(packed, torch.from_numpy(np.packbits(keep.numpy(), bitorder="little")))
    assert same(native_ops().mask_unpack(packed, numel), keep)


# --- N:M ----------------------------------------------------------------------------------------------------------


def n_of_m_by_sorting(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Python's stable sort of (is NaN, score), best first."""
    keep = np.zeros(scores.shape, dtype=bool)
    for i, row in enumerate(scores.tolist()):
        for begin in range(0, len(row), m):
            run = list(enumerate(row[begin : begin + m], start=begin))
            run.sort(key=lambda item: (True, 0.0) if math.isnan(item[1]) else (False, item[1]), reverse=True)
            keep[i, [index for index, _ in run[:n]]] = True
    return torch.from_numpy(np.packbits(keep.reshape(-1), bitorder="little"))


@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 70),
    n=st.integers(0, 8),
    m=st.sampled_from([1, 2, 3, 4, 5, 8, 16, 20]),
    seed=seeds,
)
def test_n_of_m(rows: int, columns: int, n: int, m: int, seed: int) -> None:
    scores = random_values(rows * columns, torch.float32, seed, specials=0.3)
    # Coarse values, so that ties are common.
    scores = torch.where(scores.isfinite(), (scores * 2).round() / 2, scores).view(rows, columns)
    result = native_ops().mask_n_of_m(scores, min(n, m), m)
    assert same(result, reference.mask_n_of_m(scores, min(n, m), m))
    assert same(result, n_of_m_by_sorting(scores, min(n, m), m))


@pytest.mark.parametrize("m", (2, 4, 8, 16))
def test_ties_go_to_the_lower_index(m: int) -> None:
    scores = torch.zeros(3, 4 * m)
    scores[1] = -0.0
    scores[2] = math.nan
    keep = reference.mask_unpack(native_ops().mask_n_of_m(scores, 1, m), scores.numel())
    assert keep.view(-1, m)[:, 0].all() and not keep.view(-1, m)[:, 1:].any()


# --- refusals -----------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "mask_apply_: weights is float32": lambda ops, f, b: ops.mask_apply_(f.int(), b),
    "mask_apply_: packed is uint8": lambda ops, f, b: ops.mask_apply_(f, b.int()),
    "1 dimensions, got": lambda ops, f, b: ops.mask_apply_(f.view(2, 8), b),
    "bits 1 to 17 of a mask of 2 bytes": lambda ops, f, b: ops.mask_apply_(f, b, 1),
    "is negative": lambda ops, f, b: ops.mask_unpack(b, 3, -1),
    "2 weights, 1 masks and 2 bit_offsets": lambda ops, f, b: ops.mask_apply_many_([f, f], [b], [0, 0]),
    "mask_apply_many_: bits 9 to 25": lambda ops, f, b: ops.mask_apply_many_([f], [b], [9]),
    "mask is bool": lambda ops, f, b: ops.mask_pack(f),
    "got n = 5, m = 4": lambda ops, f, b: ops.mask_n_of_m(f.view(2, 8), 5, 4),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_wrong_arguments_are_refused_alike(message: str) -> None:
    for ops in (native_ops(), reference, Fakes()):
        with pytest.raises(ValueError, match=message):
            BAD_CALLS[message](ops, torch.ones(16), torch.zeros(2, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@given(numel=st.sampled_from(LENGTHS) | st.integers(0, 900), offset=st.integers(0, 3), seed=seeds)
def test_square_sums(dtype: torch.dtype, numel: int, offset: int, seed: int) -> None:
    packed = mask_for(numel, 0, seed)
    values = random_values(numel, dtype, seed, specials=0.0, offset=offset)
    squares = values.double().square()
    expected = torch.stack([squares.sum(), squares[bits_of(packed, numel, 0)].sum()])
    for op in (native_ops().mask_square_sums, squares_reference.mask_square_sums):
        torch.testing.assert_close(op(values, packed), expected, rtol=1e-12, atol=0)


def test_square_sums_leave_masked_nan_out() -> None:
    values = torch.ones(200)
    values[70], values[5] = math.nan, math.inf
    for count, expected in ((1, 199.0), (2, 198.0)):
        mask = torch.ones(200, dtype=torch.bool)
        mask[[70, 5][:count]] = False
        for op in (native_ops().mask_square_sums, squares_reference.mask_square_sums):
            total, kept = op(values, reference.mask_pack(mask)).tolist()
            assert math.isnan(total) and kept == (math.inf if count == 1 else expected)


def test_square_sums_do_not_depend_on_threads() -> None:
    values, packed = random_values(300_007, torch.float32, 2), mask_for(300_007, 0, 1)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(native_ops().mask_square_sums(values, packed))
        finally:
            torch.set_num_threads(1)
    assert same(*results)
