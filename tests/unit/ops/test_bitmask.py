from __future__ import annotations

import pytest
import torch

from ds_compress.ops import bitmask

_LARGE = 1 << 18


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 9, 1000, _LARGE + 13])
def test_pack_and_unpack_are_inverse(numel: int) -> None:
    keep = torch.rand(numel) < 0.5
    packed = bitmask.pack(keep)
    assert packed.numel() == -(-numel // 8)
    assert torch.equal(bitmask.unpack(packed, numel), keep)


def test_bit_i_of_byte_j_is_element_8j_plus_i() -> None:
    keep = torch.zeros(16, dtype=torch.bool)
    keep[[0, 3, 15]] = True
    assert bitmask.pack(keep).tolist() == [0b00001001, 0b10000000]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("numel", [1, 13, _LARGE * 2 + 5])
def test_apply_clears_exactly_the_masked_weights(dtype: torch.dtype, numel: int) -> None:
    weights, keep = torch.randn(numel).to(dtype), torch.rand(numel) < 0.3
    expected = weights.masked_fill(~keep, 0.0)
    bitmask.apply_(weights, bitmask.pack(keep))
    assert torch.equal(weights, expected)


def test_apply_many_is_apply_of_each() -> None:
    weights = [
        torch.randn(numel).to(dtype) for numel in (0, 5, 1003) for dtype in (torch.float32, torch.bfloat16)
    ]
    masks = [bitmask.pack(torch.rand(each.numel()) < 0.5) for each in weights]
    expected = [each.clone() for each in weights]
    for each, mask in zip(expected, masks, strict=True):
        bitmask.apply_(each, mask)
    bitmask.apply_many_(zip(weights, masks, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    bitmask.apply_many_([])


def test_a_masked_nan_inf_or_negative_zero_becomes_positive_zero() -> None:
    weights = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, -3.0, 2.0])
    bitmask.apply_(weights, bitmask.pack(torch.tensor([False] * 5 + [True])))
    assert weights.tolist() == [0, 0, 0, 0, 0, 2]
    assert not torch.signbit(weights).any()


@pytest.mark.parametrize("fill", [-1.0, 3.5, float("inf")])
def test_masked_values_may_be_filled(fill: float) -> None:
    values, keep = torch.randn(1003), torch.rand(1003) < 0.5
    expected = values.masked_fill(~keep, fill)
    bitmask.apply_(values, bitmask.pack(keep), fill)
    assert torch.equal(values, expected)


def test_a_kept_nan_stays_visible() -> None:
    weights = torch.tensor([float("nan"), 1.0])
    bitmask.apply_(weights, bitmask.pack(torch.tensor([True, True])))
    assert weights[0].isnan()


def test_apply_works_on_a_view_at_any_offset() -> None:
    flat = torch.ones(100)
    bitmask.apply_(flat.narrow(0, 13, 50), bitmask.pack(torch.zeros(50, dtype=torch.bool)))
    assert flat.sum() == 50
    assert flat[13:63].sum() == 0
