"""Frozen weights as codes: the same numbers, few bytes, and a way back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.formats import FORMATS
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.packed_weight import CODES, pack, packed_weight_of, unpack, unpack_all
from ds_compress.quant.quantizers import InputQuantizer, WeightQuantizer


def grid_of(name: str) -> WeightGrid:
    if name.startswith("int"):
        bits = int(name[3:])
        return WeightGrid(
            bits=bits, narrow_range=True, granularity=Granularity.PER_COLUMN_GROUP, group_size=32
        )
    known = FORMATS[name]
    granularity = Granularity.PER_CHANNEL if known.block is None else Granularity.PER_COLUMN_GROUP
    return WeightGrid(bits=known.bits, format=name, granularity=granularity, group_size=known.block or 1)


PACKED = ["int4", "int8", "fp8_e4m3", "mxfp8", "mxfp4", "nvfp4", "nf4"]


def quantized_layer(name: str, dtype: torch.dtype = torch.float32, inputs: Any = None) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(128, 24).to(dtype)
    layer.weight.requires_grad_(False)
    layers.attach(layer).weight_quantizer = WeightQuantizer(FakeQuantConfig(grid_of(name)))
    layer.input_quantizer = inputs
    return layer


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_gradients_are_those_of_the_rounded_weight(name: str, dtype: torch.dtype) -> None:
    inputs = InputQuantizer(
        ActivationGrid(bits=8, format="fp8_e4m3", granularity=TokenGranularity.PER_TOKEN), enabled=True
    )
    whole = quantized_layer(name, dtype, inputs)
    packed = copy.deepcopy(whole)
    pack(packed, packed.weight_quantizer.fake_quant)
    assert packed.weight is None and torch.equal(
        layers.quantized_weight(packed), layers.quantized_weight(whole)
    )
    results = []
    for layer in (whole, packed):
        x = torch.randn(5, 128, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        y = layer(x)
        y.float().square().sum().backward()
        results.append((y, x.grad, layer.bias.grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "bits"), [("nvfp4", 4.5), ("mxfp4", 4.25), ("int4", 5.0), ("mxfp8", 8.25)])
def test_resident_bits(name: str, bits: float) -> None:
    layer = quantized_layer(name)
    pack(layer, layer.weight_quantizer.fake_quant)
    held = sum(buffer.nbytes for key, buffer in layer.named_buffers() if key != "weight_global_scale")
    assert 8 * held / (128 * 24) == bits
    assert [key for key, _ in layer.named_parameters()] == ["bias"]


@pytest.mark.parametrize("name", PACKED)
def test_they_survive_casts_and_state_dicts_and_come_back(name: str) -> None:
    layer = quantized_layer(name)
    pack(layer, layer.weight_quantizer.fake_quant)
    expected = layers.quantized_weight(layer)
    other = quantized_layer(name)
    with torch.no_grad():
        other.weight.mul_(3)
    pack(other, other.weight_quantizer.fake_quant)
    other.bfloat16().float()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layers.quantized_weight(other), expected)
    assert unpack_all(nn.Sequential(layer, other)) == 2
    assert packed_weight_of(layer) is None and CODES not in layer._buffers
    assert torch.equal(layer.weight, expected) and not layer.weight.requires_grad
    unpack(layer)


def test_what_cannot_be_packed() -> None:
    layer = quantized_layer("nvfp4")
    with pytest.raises(ValueError, match="4 or 8 bits"):
        pack(layer, FakeQuantConfig(WeightGrid(bits=3, granularity=Granularity.PER_CHANNEL)))
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pack(layer, layer.weight_quantizer.fake_quant)
    assert layer.weight is not None


def test_backward_after_the_codes_are_gone_says_so() -> None:
    layer = quantized_layer("mxfp4")
    pack(layer, layer.weight_quantizer.fake_quant)
    y = layer(torch.randn(2, 128, requires_grad=True))
    unpack(layer)
    with pytest.raises(RuntimeError, match="no packed weight"):
        y.sum().backward()
