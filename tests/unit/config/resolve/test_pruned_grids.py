"""Pruned weights that are quantized too are zero in forward, on every grid that is accepted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.config import ConfigError, parse_config
from ds_compress.config.resolve.resolver import resolve
from ds_compress.quant import layers
from ds_compress.techniques.weight_quantization import WeightQuantization

GRIDS = [
    (bits, kind, granularity, rounding)
    for bits, kind, granularity, rounding in itertools.product(
        (1, 2, 3, 4, 5, 6, 7, 8),
        ("symmetric", "asymmetric"),
        (None, "per_tensor", "per_channel", "per_column_group"),
        ("nearest", "stochastic"),
    )
    if bits > 2 or (kind == "symmetric" and rounding == "nearest")
]


def block_of(quantization: dict[str, Any], bits: int, **others: Any) -> dict[str, Any]:
    group = {"all": {"params": {"start_bits": bits, "target_bits": bits, "quantization_period": 0}}}
    shared = {"enabled": True, "quantize_weight_in_forward": True, **quantization}
    block = {"weight_quantization": {"shared_parameters": shared, "different_groups": group}}
    sparse = {"enabled": True, "method": "l1", "dense_ratio": 0.05}
    return {"sparse_pruning": {"shared_parameters": sparse}, **block, **others}


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 48)
        self.conv = nn.Conv2d(8, 6, 4)
        self.embedding = nn.Embedding(50, 64)


def pruned_(weight: torch.Tensor, signs: str, seed: int) -> None:
    """One weight in twenty stays; of one sign in most groups, or in all."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(weight.shape, generator=generator)
    values = {"mixed": values, "negative": -values.abs(), "positive": values.abs()}[signs]
    values[torch.rand(weight.shape, generator=generator) > 0.05] = 0
    with torch.no_grad():
        weight.copy_(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("signs", ["mixed", "negative", "positive"])
def test_zeros_are_zero_in_forward(signs: str, dtype: torch.dtype) -> None:
    for bits, kind, granularity, rounding in GRIDS:
        shared: dict[str, Any] = {"quantization_type": kind, "rounding": rounding}
        if granularity is not None:
            shared["granularity"] = granularity
        elif kind == "asymmetric":
            shared["quantize_groups"] = 48
        if granularity == "per_column_group":
            shared["group_size"] = 16
        model = Layers().to(dtype)
        plan = resolve(model, parse_config(block_of(shared, bits)))
        stage = WeightQuantization(plan.techniques["weight_quantization"], seed=0)
        stage.prepare(model)
        assert len(plan.techniques["weight_quantization"].targets) >= 2
        for target in plan.techniques["weight_quantization"].targets:
            pruned_(target.param, signs, bits)
            quantized = layers.quantized_weight(target.module)
            where = (bits, kind, granularity, rounding, target.module_name)
            assert not quantized[target.param == 0].any(), where
            assert quantized.any(), where
            x = torch.eye(64, dtype=dtype)
            if target.module is model.linear:
                with torch.no_grad():
                    assert not (target.module(x) - target.module.bias)[target.param.T == 0].any(), where


def test_embeddings_are_among_them() -> None:
    shared = {"quantization_type": "asymmetric", "granularity": "per_tensor"}
    block = block_of(shared, 4)
    for key in ("sparse_pruning", "weight_quantization"):
        groups = block[key].setdefault("different_groups", {"all": {"params": {"dense_ratio": 0.05}}})
        groups["all"]["modules"] = ["embedding"]
    model = Layers()
    stage = WeightQuantization(resolve(model, parse_config(block)).techniques["weight_quantization"], seed=0)
    stage.prepare(model)
    pruned_(model.embedding.weight, "negative", 0)
    with torch.no_grad():
        rows = model.embedding(torch.arange(50))
    assert not rows[model.embedding.weight == 0].any() and rows.any()


def test_stochastic_rounding_never_moves_a_zero() -> None:
    """The normalized zero of an asymmetric grid may be a hair below its whole number."""
    from ds_compress.quant.grid import WeightGrid
    from ds_compress.quant.weights import fake_quantize

    grid = WeightGrid(bits=8, symmetric=False, narrow_range=True, groups=4096, stochastic=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((4096, 16), generator=generator)
    weight[:, ::2] = 0
    lowest = torch.zeros(weight.shape)  # u = 0, which a draw of 24 bits is once in 16 million times
    assert not fake_quantize(weight, grid, lowest)[weight == 0].any()


def test_rows_that_another_block_prunes_count_too() -> None:
    block = block_of({"quantization_type": "asymmetric"}, 4)
    del block["sparse_pruning"]
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    rows = {"enabled": True, "dense_ratio": 0.5, "method": "l1"}
    groups = {"rows": {"params": {"dense_ratio": 0.5}, "modules": ["0"], "related_modules": [["2"]]}}
    block["row_pruning"] = {"shared_parameters": rows, "different_groups": groups}
    plan = resolve(model, parse_config(block))
    assert [t.pruned for t in plan.techniques["weight_quantization"].targets] == [True, True]


def test_the_legacy_asymmetric_grid_is_refused_where_weights_are_pruned() -> None:
    block = block_of({"quantization_type": "asymmetric", "narrow_range": False}, 4)
    with pytest.raises(ConfigError) as error:
        resolve(Layers(), parse_config(block))
    (problem,) = error.value.problems
    assert problem.path == "compression_training.weight_quantization.shared_parameters.narrow_range"
    assert "linear" in problem.got and "conv" in problem.got
    del block["sparse_pruning"]
    resolve(Layers(), parse_config(block))


def test_the_plan_says_which_grid_they_have() -> None:
    for kind, says in (("asymmetric", True), ("symmetric", False)):
        plan = resolve(Layers(), parse_config(block_of({"quantization_type": kind}, 4)))
        assert ("narrow for pruned weights" in str(plan)) is says
