"""`hf`: the layout of `save_pretrained`, for models of which nothing is quantized; else values on the grid."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.export.encoded import EncodedWeight
from ds_compress.export.format import Format
from ds_compress.export.read import Layer


class HfFormat(Format):
    """Weights as floats; quantized ones with the values that training computed with."""

    name: ClassVar[str] = "hf"

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        self.untie(layer)
        stored = self.plain(layer)
        if layer.encoded is not None:
            stored[layer.full("weight")] = self.decoded(layer, layer.encoded)
            self.note("quantized weights are written as floats on their grid: this format stores no integers")
        if layer.input is not None:
            self.ignores_inputs = True
            self.note("activations are not quantized when this folder is loaded: the format cannot say so")
        return stored

    def decoded(self, layer: Layer, encoded: EncodedWeight) -> torch.Tensor:
        # In the dtype that a loader is told to use, or it would round them itself.
        return encoded.values().to(self.loaded_dtype(self.trained_dtype))
