"""`mask_window`: native against reference, and both against plain comparisons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_compress.ops.reference import mask, window
from tests.native.elementwise import LENGTHS, native_ops, random_bytes, random_values, same

KEYS = st.integers(-(2**31), 2**31 - 1)
seeds = st.integers(0, 2**31)


@given(
    numel=st.sampled_from(LENGTHS) | st.integers(0, 900),
    bounds=st.tuples(KEYS, KEYS).map(sorted),
    magnitude=st.booleans(),
    some=st.booleans(),
    capacity=st.integers(0, 60),
    offset=st.integers(0, 3),
    seed=seeds,
)
def test_the_reference_is_met(
    numel: int, bounds: list[int], magnitude: bool, some: bool, capacity: int, offset: int, seed: int
) -> None:
    scores = random_values(numel, torch.float32, seed, specials=0.2, offset=offset)
    competing = random_bytes(-(-numel // 8), seed + 1) if some else None
    arguments: tuple[Any, ...] = (scores, competing, *bounds, magnitude, capacity)
    for mine, expected in zip(
        native_ops().mask_window(*arguments), window.mask_window(*arguments), strict=True
    ):
        assert same(mine, expected)


@pytest.mark.parametrize("magnitude", [True, False])
def test_it_says_what_is_above_and_what_inside(magnitude: bool) -> None:
    torch.manual_seed(0)
    scores = torch.randn(5003)
    low, high = 0.4, 0.9
    bounds = torch.tensor([low, high]).view(torch.int32).tolist()
    packed, keys, places, counts = native_ops().mask_window(scores, None, *bounds, magnitude, 5003)
    values = scores.abs() if magnitude else scores
    above, inside = values > high, (values >= low) & (values <= high)
    assert torch.equal(mask.mask_unpack(packed, 5003), above)
    found = int(counts[1])
    assert torch.equal(places[:found].long(), inside.nonzero().flatten())
    assert torch.equal(keys[:found].view(torch.float32), values[inside])
    assert counts.tolist() == [int(above.sum()), int(inside.sum()), 0]


def test_order_holds_for_both_signs_and_zeros() -> None:
    scores = torch.tensor([-math.inf, -2.0, -1.0, -0.0, 0.0, 1.0, math.nan])
    packed, keys, places, counts = native_ops().mask_window(scores, None, -(2**31), 2**31 - 1, False, 7)
    assert counts.tolist() == [0, 7, 2] and places.tolist() == list(range(7))
    assert torch.equal(keys, keys.sort().values) and keys[3] == keys[4] == 0 and not packed.any()


def test_threads_do_not_change_the_result() -> None:
    scores = random_values(300_007, torch.float32, 2)
    competing = random_bytes(37_501, 3)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            results.append(native_ops().mask_window(scores, competing, 2**29, 2**30, True, 9000))
        finally:
            torch.set_num_threads(1)
    assert all(same(a, b) for a, b in zip(*results, strict=True))


WRONG: dict[str, tuple[Any, ...]] = {
    "scores is float32, got float64": (torch.zeros(9, dtype=torch.float64), None, 0, 1, True, 1),
    "low <= high are int32, got 2 and 1": (torch.zeros(9), None, 2, 1, True, 1),
    "low <= high are int32, got 0 and 4294967296": (torch.zeros(9), None, 0, 2**32, True, 1),
    "a capacity of -1 is negative": (torch.zeros(9), None, 0, 1, True, -1),
    "bits 0 to 9 of a mask of 1 bytes": (torch.zeros(9), torch.zeros(1, dtype=torch.uint8), 0, 1, True, 1),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message: str) -> None:
    for op in (native_ops().mask_window, window.mask_window):
        with pytest.raises(ValueError, match=message):
            op(*WRONG[message])
