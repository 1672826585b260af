"""`hf`: the layout of `save_pretrained`, for models of which nothing is quantized; else values on the grid."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.export.format import Format
from ds_compress.export.quantized_matrix import QuantizedMatrix
from ds_compress.export.read import Layer


class HfFormat(Format):
    """Weights as floats; quantized ones with the values that training computed with."""

    name: ClassVar[str] = "hf"
    stores_stacks: ClassVar[bool] = True

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        self.untie(layer)
        stored = self.plain(layer)
        if layer.quantized is not None:
            rounded = self.dequantized(layer, layer.quantized)
            stored[layer.full("weight")] = rounded
            self._note_floats(rounded, layer.quantized.dequantize(), layer.quantized.format)
        for name, experts in layer.experts.items():
            stored[layer.full(name)] = self.dequantized_experts(layer, experts)
            self._note_floats(stored[layer.full(name)], experts.dequantize(), experts.first.format)
        if layer.input is not None or layer.expert_inputs:
            self.ignores_inputs = True
            self.note("activations are not quantized when this folder is loaded: the format cannot say so")
        return stored

    def dequantized(self, layer: Layer, quantized: QuantizedMatrix) -> torch.Tensor:
        # In the dtype that a loader is told to use, or it would round them itself.
        return quantized.dequantize().to(self.loaded_dtype(self.trained_dtype))

    def _note_floats(self, stored: torch.Tensor, exact: torch.Tensor, format: str) -> None:
        self.note("quantized weights are written as floats on their grid: this format stores no integers")
        if not torch.equal(stored.float(), exact):
            self.note(
                f"{stored.dtype} rounds the values of {format} weights, so that they leave their grid: dtype float32 "
                "stores them exactly"
            )
