"""Sums over units and masks of units, on fragments cut anywhere, against the same on the whole tensor."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_compress.select.units import global_counts, top_indices, unit_mask, unit_sums


def whole_sums(values: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    moved = values.movedim(dim, 0).reshape(values.shape[dim], -1).double().sum(1)
    return moved[index].sum(1)


@st.composite
def fragments(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor, list[int]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    width = draw(st.integers(1, shape[dim]))
    units = draw(st.integers(1, shape[dim] // width))
    order = draw(st.permutations(range(shape[dim])))
    index = torch.tensor(order[: units * width]).view(units, width)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    cuts = sorted(draw(st.lists(st.integers(0, values.numel()), max_size=3)))
    return values, dim, index, [0, *cuts, values.numel()]


class TestUnits:
    @settings(deadline=None, max_examples=60)
    @given(fragments())
    def test_sums_of_fragments_add_up(self, case: tuple[torch.Tensor, int, torch.Tensor, list[int]]) -> None:
        values, dim, index, cuts = case
        flat, total = values.flatten(), torch.zeros(index.shape[0], dtype=torch.float64)
        for low, high in itertools.pairwise(cuts):
            total += unit_sums(flat[low:high], low, values.shape, dim, index)
        torch.testing.assert_close(total, whole_sums(values, dim, index), rtol=1e-12, atol=1e-12)

    @settings(deadline=None, max_examples=60)
    @given(fragments(), st.integers(0, 63))
    def test_masks_of_fragments_join(
        self, case: tuple[torch.Tensor, int, torch.Tensor, list[int]], bits: int
    ) -> None:
        values, dim, index, cuts = case
        keep = torch.tensor([bool(bits >> unit & 1) for unit in range(index.shape[0])])
        joined = torch.cat(
            [
                unit_mask(keep, low, high - low, values.shape, dim, index)
                for low, high in itertools.pairwise(cuts)
            ]
        )
        expected = torch.ones(values.shape, dtype=torch.bool)
        expected.index_fill_(dim, index[~keep].flatten(), False)
        assert torch.equal(joined.view(values.shape), expected)

    def test_equal_scores_keep_the_lower_index(self) -> None:
        assert top_indices(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2).tolist() == [1, 2]


class TestShares:
    def test_weak_structures_give_more(self) -> None:
        flat, peaked = torch.ones(8), torch.tensor([8.0, 8.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
        assert global_counts([flat, peaked], 10, 1) == [8, 2]

    @pytest.mark.parametrize("round_to", [1, 2, 4])
    def test_counts_are_multiples_and_never_zero(self, round_to: int) -> None:
        torch.manual_seed(0)
        counts = global_counts([torch.rand(8), torch.zeros(8), torch.rand(8) * 100], 12, round_to)
        assert all(count >= round_to and count % round_to == 0 for count in counts)

    def test_what_is_gone_stays_below(self) -> None:
        gone = torch.tensor([torch.finfo(torch.float32).min, 1.0, 1.0, 1.0])
        assert global_counts([gone, torch.ones(4)], 7, 1) == [3, 4]
