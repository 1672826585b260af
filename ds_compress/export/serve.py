"""Layers that run on stored integers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ds_compress.export.encoded import EncodedWeight
from ds_compress.export.read import InputScheme
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.ops import kernels
from ds_compress.quant import layers
from ds_compress.quant.grid import TokenGranularity, ranges_between

_ALIGNED_GROUP = 32


class Int8Linear(nn.Module):
    """activation(x @ weight.T + bias) with int8 codes on both sides; the weight is packed for the kernel once.

    input_scale: fp32 (1,) of a static range, None: one per token. steps: codes that fit into max|x|.
    """

    def __init__(self, encoded: EncodedWeight, bias: torch.Tensor | None, used: InputScheme) -> None:
        super().__init__()
        self.out_features, self.in_features = encoded.codes.shape
        self.codes, self.scale = encoded.codes, encoded.scale[:, 0].contiguous()
        self.bias = None if bias is None else bias.float()
        self.steps, self.activation = used.grid.steps, "none"
        self.input_scale: torch.Tensor | None = None
        if used.input_range is not None:
            lowest, highest = used.input_range[0], used.input_range[1]
            self.input_scale = ranges_between(lowest, highest, used.grid).scale.reshape(1)
        self._packed: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Its shape and dtype, for models that look at them."""
        return torch.empty(self.out_features, self.in_features, device="meta")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ops = kernels()
        if self._packed is None:
            self._packed = ops.int8_linear_pack(self.codes)
            self.codes = self.codes.new_empty(0)
        y: torch.Tensor = ops.int8_linear(
            input if input.is_contiguous() else input.contiguous(),
            self._packed,
            self.scale,
            self.bias,
            self.input_scale,
            steps=self.steps,
            activation=self.activation,
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, activation={self.activation}"
        )


class Int4Linear(Int8Linear):
    """The same with weights of up to 4 bits and a scale for every `group_size` columns."""

    def __init__(self, encoded: EncodedWeight, bias: torch.Tensor | None, used: InputScheme) -> None:
        super().__init__(encoded, bias, used)
        self.scale, self.group_size = encoded.scale, encoded.group_size

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        ops = kernels()
        if self._packed is None:
            self._packed = ops.int4_linear_pack(self.codes, self.scale)
            self.codes = self.codes.new_empty(0)
        y: torch.Tensor = ops.int4_linear(
            input.contiguous(),
            self._packed,
            self.out_features,
            self.group_size,
            self.bias,
            self.input_scale,
            steps=self.steps,
            activation=self.activation,
        )
        return y


class Int8Embedding(nn.Module):
    """Rows of int8 codes, read back as fp32 when they are looked up."""

    def __init__(self, encoded: EncodedWeight, padding_idx: int | None) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = encoded.shape
        self.padding_idx = padding_idx
        self.codes, self.scale = encoded.codes, encoded.scale

    @property
    def weight(self) -> torch.Tensor:
        """All rows as floats, made anew; for models that read the table without a lookup."""
        return self.codes.float() * self.scale

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.embedding(input, self.codes) * F.embedding(input, self.scale)


def serving_module(module: nn.Module, encoded: EncodedWeight | None, used: InputScheme | None) -> nn.Module:
    """What serves in the place of `module`, a float layer with its bias loaded, and its weight if not `encoded`.

    The integer kernels where they compute what training did; else the layer itself with the weight read back, and a
    quantizer for its input where that was quantized.
    """
    kind = kind_of(module)
    bias = module._parameters.get("bias")
    if (
        kind is ModuleKind.EMBEDDING
        and encoded is not None
        and encoded.groups == 1
        and encoded.offset is None
    ):
        return Int8Embedding(encoded, getattr(module, "padding_idx", None))
    if kind in (ModuleKind.LINEAR, ModuleKind.CONV1D) and encoded is not None and used is not None:
        fits = used.grid.symmetric and used.grid.bits == 8 and encoded.offset is None
        fits = fits and used.grid.granularity is not TokenGranularity.PER_SAMPLE
        fits = fits and (used.grid.static or used.grid.granularity is TokenGranularity.PER_TOKEN)
        if fits and encoded.groups == 1:
            return Int8Linear(encoded, bias, used)
        if fits and encoded.bits <= 4 and encoded.group_size % _ALIGNED_GROUP == 0:
            return Int4Linear(encoded, bias, used)
    if encoded is not None:
        module._parameters["weight"] = nn.Parameter(encoded.values(), requires_grad=False)
    if used is not None:
        quantizer = layers.InputQuantizer(used.grid, enabled=True, input_range=used.input_range)
        layers.attach(module).input_quantizer = quantizer
    return module
