"""A weight as integers: exactly what training computed with, for every grid, cut or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

import ds_compress
from ds_compress.export.quantized_matrix import quantize_matrix, quantize_rows
from ds_compress.export.serving_tensors import loaded_weight, stored_weight
from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig, fake_quantize_weight
from ds_compress.quant.formats import FORMATS
from ds_compress.quant.grid import Granularity, WeightGrid
from ds_compress.quant.packed_weight import pack
from ds_compress.quant.quantizers import WeightQuantizer
from ds_compress.quant.weights import initial_scale
from tests.models import tiny_llama

GRANULARITIES: list[dict[str, Any]] = [
    {"granularity": Granularity.PER_TENSOR},
    {"granularity": Granularity.PER_CHANNEL},
    {"granularity": Granularity.PER_COLUMN_GROUP, "group_size": 8},
    {"granularity": Granularity.PER_GROUP, "groups": 4},
    {"granularity": Granularity.PER_GROUP, "groups": 32},
]


def weight(
    rows: int = 16, columns: int = 24, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("how", GRANULARITIES, ids=lambda how: "-".join(map(str, how.values())))
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("channel_axis", [0, 1])
class TestEveryGrid:
    def test_values_codes_and_storage(
        self, how: dict[str, Any], bits: int, symmetric: bool, channel_axis: int
    ) -> None:
        if bits <= 2 and not symmetric:
            pytest.skip("binary and ternary have no offset")
        if channel_axis and how.get("groups") == 32:
            pytest.skip("refused: see below")
        fake_quant = FakeQuantConfig(
            WeightGrid(bits=bits, symmetric=symmetric, channel_axis=channel_axis, **how)
        )
        x = weight()
        quantized = quantize_matrix(x, fake_quant)
        trained = fake_quantize_weight(x, fake_quant).values
        assert torch.equal(quantized.dequantize(), trained)
        scheme = {
            "bits": quantized.bits,
            "group_size": quantized.group_size,
            "shape": list(quantized.shape),
            "transposed": quantized.transposed,
        }
        assert torch.equal(loaded_weight(stored_weight(quantized), scheme).dequantize(), trained)
        if symmetric:
            if quantized.bits == 1:
                assert set(quantized.values.unique().tolist()) == {-1, 1}
                return
            assert int(quantized.values.min()) >= -(2 ** (quantized.bits - 1))
            packed = pack_to_int32(quantized.values, quantized.bits)
            assert torch.equal(
                unpack_from_int32(packed, quantized.bits, quantized.values.shape), quantized.values
            )


@given(
    bits=st.integers(2, 8),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    narrow=st.booleans(),
)
def test_learned_scales_go_in_as_they_are(
    bits: int, rows: int, columns: int, seed: int, dtype: torch.dtype, narrow: bool
) -> None:
    grid = WeightGrid(bits=bits, granularity=Granularity.PER_CHANNEL, learned=True, narrow_range=narrow)
    x = weight(rows, columns, seed, dtype)
    scale = initial_scale(x, grid) * 1.37
    quantized = quantize_matrix(x, FakeQuantConfig(grid), scale)
    assert torch.equal(quantized.scale[:, 0], scale.abs().clamp_min(2.0**-126))
    assert torch.equal(
        quantized.dequantize().to(dtype), fake_quantize_weight(x, FakeQuantConfig(grid), scale).values
    )


def test_legacy_grid_uses_the_lowest_code() -> None:
    grid = WeightGrid(bits=8, granularity=Granularity.PER_CHANNEL)
    x = weight()
    x[0, 0] = -x[0].abs().max() - 1
    quantized = quantize_matrix(x, FakeQuantConfig(grid))
    assert int(quantized.values[0, 0]) == -128
    assert float(quantized.scale[0, 0]) == pytest.approx(2 * float(x[0].abs().max()) / 256)


@pytest.mark.parametrize("channel_axis", [0, 1])
def test_cut_keeps_values(channel_axis: int) -> None:
    grid = WeightGrid(bits=4, granularity=Granularity.PER_CHANNEL, channel_axis=channel_axis)
    x = weight()
    whole = quantize_matrix(x, FakeQuantConfig(grid))
    rows, columns = torch.tensor([0, 3, 4, 15]), torch.tensor([1, 2, 20])

    def apply(t: torch.Tensor) -> torch.Tensor:
        return t.index_select(0, rows).index_select(1, columns)

    assert torch.equal(whole.cut(apply).dequantize(), apply(whole.dequantize()))


def test_cut_by_whole_groups_only() -> None:
    grid = WeightGrid(bits=4, granularity=Granularity.PER_COLUMN_GROUP, group_size=8)
    whole = quantize_matrix(weight(), FakeQuantConfig(grid))
    assert torch.equal(whole.cut(lambda t: t[:, 8:]).dequantize(), whole.dequantize()[:, 8:])
    with pytest.raises(ValueError, match="across groups of 8"):
        whole.cut(lambda t: t[:, 4:])


@pytest.mark.parametrize(
    ("fake_quant", "x", "reason"),
    [
        (FakeQuantConfig(WeightGrid(bits=8), blend_ratio=0.5), weight(), "blend of 50%"),
        (FakeQuantConfig(WeightGrid(bits=8)), weight().fill_(torch.nan), "NaN"),
        (FakeQuantConfig(WeightGrid(bits=8, groups=32, channel_axis=1)), weight(), "cuts across its rows"),
        (
            FakeQuantConfig(WeightGrid(bits=4, granularity=Granularity.PER_COLUMN_GROUP, group_size=10)),
            weight(),
            "no multiple of group_size 10",
        ),
    ],
)
def test_refusals(fake_quant: FakeQuantConfig, x: torch.Tensor, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        quantize_matrix(x, fake_quant)


def test_rows_of_an_embedding() -> None:
    x = weight()
    quantized = quantize_rows(x)
    assert float((quantized.dequantize() - x).abs().max()) <= float(quantized.scale.max()) / 2 + 1e-7


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp8_e4m3"])
def test_packed_weights_are_exported_as_they_are_held(format: str, tmp_path: Path) -> None:
    block = FORMATS[format].block
    granularity = Granularity.PER_CHANNEL if block is None else Granularity.PER_COLUMN_GROUP
    grid = WeightGrid(
        bits=FORMATS[format].bits, format=format, granularity=granularity, group_size=block or 1
    )
    model = tiny_llama(hidden=64, intermediate=64, tied=False)
    for module in [m for name, m in model.named_modules() if name.endswith("_proj")]:
        layers.attach(module).weight_quantizer = WeightQuantizer(FakeQuantConfig(grid))
        module.weight.requires_grad_(False)
    rounded = {n: layers.quantized_weight(m).clone() for n, m in model.named_modules() if n.endswith("_proj")}
    for module in [model.get_submodule(name) for name in rounded]:
        pack(module, module.weight_quantizer.fake_quant)
    ds_compress.export(model, tmp_path / "out", "torch", embeddings="float")
    loaded = ds_compress.from_pretrained(tmp_path / "out")
    ids = torch.arange(8).view(1, 8)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    state = dict(loaded.named_parameters()) | dict(loaded.named_buffers())
    for name, values in rounded.items():
        if f"{name}.weight" in state:
            assert torch.equal(state[f"{name}.weight"], values)
