"""Layers that run on stored integers and small floats; what no kernel has runs as fp32, dequantized once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.export.int8_product import Int8Product, blocks_worth_leaving_out
from ds_compress.export.integer_kernels import misfit, takes_groups
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import InputScheme
from ds_compress.export.serve_weight_only import WeightOnlyLinear, weight_only_misfit
from ds_compress.export.shape_only import ShapeOnly
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.ops import kernels
from ds_compress.quant import layers
from ds_compress.quant.qparams import qparams_from_range

_PRODUCTS = (ModuleKind.LINEAR, ModuleKind.CONV1D)


class Int8Linear(nn.Module):
    """activation(x @ weight.T + bias) with int8 inputs and weights; the weight is packed for the kernel once.

    input_scale: fp32 (1,) of a static range, None: one per token. scale_divisor: see `Grid.scale_divisor`.
    """

    def __init__(self, quantized: QuantizedMatrix, bias: torch.Tensor | None, used: InputScheme) -> None:
        super().__init__()
        self.out_features, self.in_features = quantized.values.shape
        self.int_weight, self.scale = quantized.values, quantized.scale[:, 0].contiguous()
        self.bias = None if bias is None else bias.float()
        self.scale_divisor, self.activation = used.grid.scale_divisor, "none"
        self.input_scale: torch.Tensor | None = None
        if used.input_range is not None:
            lowest, highest = used.input_range[0], used.input_range[1]
            self.input_scale = qparams_from_range(lowest, highest, used.grid).scale.reshape(1)
        self._packed: torch.Tensor | None = None
        self._product: Int8Product | None = None
        self._blocks = blocks_worth_leaving_out(self.int_weight) if type(self) is Int8Linear else None

    @property
    def weight(self) -> torch.Tensor:
        """Its shape and dtype, for models that look at them."""
        return ShapeOnly.of(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self._product is None:
            self._product = Int8Product.of(self.int_weight, self._blocks)
            self.int_weight = self.int_weight.new_empty(0)
        return self._product(
            input if input.is_contiguous() else input.contiguous(),
            self.scale,
            self.bias,
            self.input_scale,
            self.scale_divisor,
            self.activation,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"
        )


class Int4Linear(Int8Linear):
    """The same with weights of up to 4 bits and a scale for every `group_size` columns."""

    def __init__(self, quantized: QuantizedMatrix, bias: torch.Tensor | None, used: InputScheme) -> None:
        super().__init__(quantized, bias, used)
        self.scale, self.group_size = quantized.scale, quantized.group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ops = kernels()
        if self._packed is None:
            self._packed = ops.int4_linear_pack(self.int_weight, self.scale)
            self.int_weight = self.int_weight.new_empty(0)
        y: torch.Tensor = ops.int4_linear(
            input.contiguous(),
            self._packed,
            self.out_features,
            self.group_size,
            self.bias,
            self.input_scale,
            steps=self.scale_divisor,
            activation=self.activation,
        )
        return y


class Int8Embedding(nn.Module):
    """Rows of int8 values, dequantized in fp32 when they are looked up, then rounded to the model's dtype."""

    def __init__(self, quantized: QuantizedMatrix, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = quantized.shape
        self.padding_idx = padding_idx
        self.int_weight, self.scale = quantized.values, quantized.scale
        self.dtype = torch.float32

    @property
    def weight(self) -> torch.Tensor:
        """All rows as floats, made anew; for models that read the table without a lookup."""
        return (self.int_weight.float() * self.scale).to(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return (F.embedding(input, self.int_weight) * F.embedding(input, self.scale)).to(self.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Int8Embedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        return self


def serving_module(
    module: nn.Module, quantized: QuantizedMatrix | None, used: InputScheme | None, weight_only: bool = True
) -> nn.Module:
    """The module that replaces `module`: a float layer whose bias is loaded, and whose weight is, if not `quantized`.

    One that runs on the integer kernels where they compute what training did, or, where inputs are floats, with the
    weight as it is stored; else the layer itself with the weight dequantized, and a quantizer for its input where that
    was quantized. weight_only: False dequantizes where inputs are floats.
    """
    kind = kind_of(module)
    bias = module._parameters.get("bias")
    if quantized is not None and kind is ModuleKind.EMBEDDING and _is_plain_table(quantized):
        return Int8Embedding(quantized, getattr(module, "padding_idx", None))
    if quantized is not None and kind in _PRODUCTS:
        if used is not None and misfit(quantized, used) is None:
            return (Int4Linear if takes_groups(quantized) else Int8Linear)(quantized, bias, used)
        if used is None and weight_only and weight_only_misfit(quantized) is None:
            return WeightOnlyLinear(quantized, bias)
    if quantized is not None:
        module._parameters["weight"] = nn.Parameter(quantized.dequantize(), requires_grad=False)
    if used is not None:
        quantizer = layers.InputQuantizer(used.grid, enabled=True, input_range=used.input_range)
        layers.attach(module).input_quantizer = quantizer
    return module


def dequantized_because(
    kind: ModuleKind | None, quantized: QuantizedMatrix, used: InputScheme | None
) -> str | None:
    """Why `serving_module` dequantizes this weight; None where it keeps it as it is stored."""
    if kind is ModuleKind.EMBEDDING:
        return None if _is_plain_table(quantized) else "tables in groups or floats"
    if kind not in _PRODUCTS:
        return "layers that are not linear"
    return weight_only_misfit(quantized) if used is None else misfit(quantized, used)


def _is_plain_table(quantized: QuantizedMatrix) -> bool:
    return quantized.format == "int" and quantized.groups == 1 and quantized.offset is None
