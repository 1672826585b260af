"""Which weights share a scale, against plain slicing."""

from __future__ import annotations

import math

import pytest
import torch

from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.layout import (
    check_shape,
    join_weight,
    scale_shape,
    split_scale,
    split_weight,
)
from tests.unit.quant.grids import LAYOUTS, groups_of


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_takes_apart_and_joins(layout):
    grid = WeightGrid(8, **layout)
    for shape in [(10, 7), (5, 4, 3, 2)]:
        if grid.channel_axis and len(shape) > 2:
            continue
        weight = torch.arange(math.prod(shape), dtype=torch.float32).view(shape)
        blocks = split_weight(weight, grid)
        assert torch.equal(join_weight([block.clone() for block in blocks], shape, grid), weight)
        scale = torch.arange(math.prod(scale_shape(shape, grid)), dtype=torch.float32)
        parts = split_scale(scale.view(scale_shape(shape, grid)), shape, grid)
        marked = [torch.zeros_like(b) + p for b, p in zip(blocks, parts, strict=True)]
        groups = groups_of(weight, grid)
        owner = join_weight(marked, shape, grid).flatten()
        assert {tuple(owner[index].unique().tolist()) for index in groups} == {
            (float(i),) for i in range(len(groups))
        }


def test_shapes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="does not divide"):
        check_shape((3, 5), WeightGrid(8, groups=4))
    with pytest.raises(ValueError, match="2 or more axes"):
        check_shape((3,), WeightGrid(8, granularity=Granularity.PER_CHANNEL))
