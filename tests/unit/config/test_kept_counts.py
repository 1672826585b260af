"""How many are kept, of the decimal that the JSON shows: 0.07 of 100 is 7, although 0.07 * 100 is more in floats."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.config.structure_targets import kept_units
from ds_compress.config.targets import exact_ceil
from tests.multirank.common import ds_config, engine_of
from tests.single import init_single_process

# Of which ceil(float product) is one too many.
TRAPS = [
    (hundredths, units)
    for hundredths in range(1, 100)
    for units in (10, 50, 100, 200, 300, 1000)
    if math.ceil(hundredths / 100 * units) != math.ceil(Fraction(hundredths, 100) * units)
]


def test_there_are_traps() -> None:
    assert (7, 100) in TRAPS and len(TRAPS) > 20


@pytest.mark.parametrize(("hundredths", "units"), TRAPS)
def test_counts_of_weights_and_of_units_are_exact(hundredths: int, units: int) -> None:
    expected = math.ceil(Fraction(hundredths, 100) * units)
    assert exact_ceil(hundredths / 100, units) == expected
    assert kept_units(hundredths / 100, units, 1, rounds_up=True) == expected


def test_halves_are_rounded_up_as_written() -> None:
    assert 0.145 * 100 < 14.5, "in floats it is not even a half"
    assert kept_units(0.145, 100, 1) == 15
    assert kept_units(0.29, 100, 2) == 30
    assert kept_units(0.285, 1000, 10) == 290


@pytest.mark.parametrize("scope", ["layer", "group", "global"])
def test_a_trained_weight_keeps_seven_of_a_hundred(scope: str) -> None:
    init_single_process()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10))
    shared = {"enabled": True, "method": "l1", "dense_ratio": 0.07, "scope": scope}
    with engine_of(model, ds_config(0, {"sparse_pruning": {"shared_parameters": shared}})) as engine:
        for _ in range(2):
            engine.backward(engine(torch.randn(4, 10)).square().mean())
            engine.step()
        kept = [int(layer.weight.count_nonzero()) for layer in (model[0], model[2])]
    assert sum(kept) == 14
    assert scope != "layer" or kept == [7, 7]


def test_a_pruned_layer_keeps_seven_rows_of_a_hundred() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 4))
    shared = {"enabled": True, "method": "l1", "dense_ratio": 0.07, "round_to": 1}
    groups = {"a": {"params": {"dense_ratio": 0.07}, "modules": ["0"], "related_modules": [["2"]]}}
    block = {"row_pruning": {"shared_parameters": shared, "different_groups": groups}}
    ds_compress.finalize(model, block)
    assert (model[0].out_features, model[2].in_features) == (7, 7)
