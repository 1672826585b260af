"""A frozen weight that is kept as its codes: what a quantized base under adapters needs while it trains (QLoRA).

The codes and scales are buffers of the layer, so they move, save and load with it. All are stored as integers, because
`module.bfloat16()` rounds every buffer of floats: fp32 scales as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ds_compress.ops.reference.float_formats import E4M3, ScaleKind, decode, encode, power_of_two
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import WeightGrid
from ds_compress.quant.weights import QuantizedWeight, dequantize, quantize

CODES, SCALES, GLOBAL_SCALE = "weight_codes", "weight_scales", "weight_global_scale"
BUFFERS = frozenset((CODES, SCALES, GLOBAL_SCALE))
BITS = (4, 8)
"""Of codes that fill whole bytes by themselves or in pairs."""
_HELD = "_ds_compress_packed"
_E8M0_BIAS = 127


@dataclass(frozen=True)
class PackedWeight:
    """How the buffers of a layer are read back. shape, dtype: of the weight that they stand for."""

    grid: WeightGrid
    shape: torch.Size
    dtype: torch.dtype

    def quantized(self, layer: nn.Module) -> QuantizedWeight:
        """Codes and scales, unpacked."""
        buffers = layer._buffers
        codes, scales = buffers[CODES], buffers[SCALES]
        assert codes is not None and scales is not None
        shared = buffers.get(GLOBAL_SCALE)
        global_scale = None if shared is None else shared.view(torch.float32)
        values = _unpacked(codes, self.grid).view(self.shape)
        return QuantizedWeight(
            values, _read_scale(scales, self.grid, global_scale), None, self.grid, global_scale
        )

    def dequantized(self, layer: nn.Module, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight that forward computes with."""
        return dequantize(self.quantized(layer), dtype or self.dtype)


def packed_weight_of(layer: nn.Module) -> PackedWeight | None:
    """None where the layer has its weight."""
    held: PackedWeight | None = vars(layer).get(_HELD)
    return held


@torch.no_grad()
def pack(layer: nn.Module, fake_quant: FakeQuantConfig) -> None:
    """The layer loses its `weight`, which must be whole, and holds the codes that forward would have made of it.

    Raises:
        ValueError: the grid has an offset or codes that do not fill bytes, or the weight is not finite.
    """
    grid, weight = fake_quant.grid, layer.get_parameter("weight")
    if grid.bits not in BITS or not grid.symmetric:
        raise ValueError(
            f"only symmetric weights of 4 or 8 bits are packed, and this one is {grid.describe()}"
        )
    if not bool(weight.isfinite().all()):
        raise ValueError("it has NaN or Inf")
    stored = quantize(weight.detach(), grid, global_scale=fake_quant.global_scale)
    vars(layer)[_HELD] = PackedWeight(grid, weight.shape, weight.dtype)
    layer._parameters["weight"] = None
    layer.register_buffer(CODES, _packed(stored.values, grid))
    layer.register_buffer(SCALES, _written_scale(stored))
    if stored.global_scale is not None:
        layer.register_buffer(GLOBAL_SCALE, stored.global_scale.clone().view(torch.int32))


@torch.no_grad()
def unpack(layer: nn.Module) -> None:
    """The layer has a frozen `weight` again, with the values that forward computed with."""
    held = packed_weight_of(layer)
    if held is None:
        return
    values = held.dequantized(layer)
    for name in BUFFERS:
        layer._buffers.pop(name, None)
    del vars(layer)[_HELD]
    layer._parameters["weight"] = nn.Parameter(values, requires_grad=False)


def unpack_all(model: nn.Module) -> int:
    """`unpack` of every layer; how many there were."""
    held = [module for module in model.modules() if packed_weight_of(module) is not None]
    for module in held:
        unpack(module)
    return len(held)


def _packed(values: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    codes = values.view(torch.uint8).flatten()
    if grid.bits == 8:
        return codes
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return (codes[0::2] & 15) | (codes[1::2] << 4)


def _unpacked(packed: torch.Tensor, grid: WeightGrid) -> torch.Tensor:
    if grid.bits == 8:
        return packed.view(grid.quantized_dtype)
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten()
    if grid.format != "int":
        return codes
    return ((codes ^ 8).to(torch.int8) - 8).to(torch.int8)  # the sign of a number of four bits


def _written_scale(stored: QuantizedWeight) -> torch.Tensor:
    known, scale = stored.grid.number_format, stored.scale.float()
    if known is None or known.scale is ScaleKind.FP32:
        return scale.contiguous().view(torch.int32)
    if known.scale is ScaleKind.E8M0:
        return (torch.frexp(scale).exponent - 1 + _E8M0_BIAS).to(torch.uint8)
    assert stored.global_scale is not None
    # Exactly the number of E4M3 that was divided by the global scale: the product is nearest to it.
    return encode((scale * stored.global_scale).to(torch.float8_e4m3fn).float(), E4M3)


def _read_scale(scales: torch.Tensor, grid: WeightGrid, global_scale: torch.Tensor | None) -> torch.Tensor:
    known = grid.number_format
    if known is None or known.scale is ScaleKind.FP32:
        return scales.view(torch.float32)
    if known.scale is ScaleKind.E8M0:
        return power_of_two(scales.to(torch.int32) - _E8M0_BIAS)
    assert global_scale is not None
    return decode(scales, E4M3) / global_scale
