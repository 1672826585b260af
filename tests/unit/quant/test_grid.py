"""Grids without a formula are refused."""

from __future__ import annotations

import pytest

from ds_compress.quant.grid import WeightGrid


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 0},
        {"bits": 9},
        {"bits": 2, "symmetric": False},
        {"bits": 1, "stochastic": True},
        {"bits": 1, "learned": True},
        {"bits": 4, "learned": True, "symmetric": False},
        {"bits": 4, "learned": True, "stochastic": True},
        {"bits": 4, "groups": 0},
    ],
)
def test_grids_without_a_formula_are_refused(wrong):
    with pytest.raises(ValueError, match=r"bits|bit|least"):
        WeightGrid(**wrong)
