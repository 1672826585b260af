"""`onnx`."""

from __future__ import annotations

from typing import ClassVar

import torch

from ds_compress.export.errors import ExportError
from ds_compress.export.format import Format
from ds_compress.export.read import Layer


class OnnxFormat(Format):
    name: ClassVar[str] = "onnx"

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        raise ExportError("onnx: not yet")
