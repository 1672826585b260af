"""`onnx`: quantize/dequantize pairs around the linear layers of an encoder, for onnxruntime and other runtimes.

The float model is exported, and each quantized weight is replaced by its integers with a DequantizeLinear (int4 where
4 bits suffice); a static input range becomes QuantizeLinear and DequantizeLinear. Per-token scales have no operator:
such inputs stay floats, which the report notes. Tables with one scale per row are looked up as integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.format import OTHER_FORMAT
from ds_compress.export.graph_format import GraphFormat, Positional, free_axes
from ds_compress.export.inputs import example_inputs
from ds_compress.export.read import Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.kinds import ModuleKind
from ds_compress.quant.grid import TokenGranularity

FILE_NAME = "model.onnx"
_OPSET = 23
"""The first with Attention, which onnxruntime and OpenVINO run as one operator."""
_PRODUCTS = (ModuleKind.LINEAR, ModuleKind.CONV1D)


@dataclass
class OnnxFormat(GraphFormat):
    """Keeps the whole model in memory: a graph is exported at once."""

    name: ClassVar[str] = "onnx"
    loader: ClassVar[str] = "onnx"
    packages: ClassVar[Sequence[str]] = ("onnx", "onnxruntime", "onnxscript")

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        stored = super().tensors(layer)
        added = self.layers[-1]
        is_static = layer.input is not None and layer.input.input_range is not None
        if layer.input is not None and not is_static and not integer_inputs(added):
            self.ignored_inputs.append(layer.name)
            self.note(
                "inputs that are rounded per token stay floats where they or their weight have zero points or groups, "
                f"as those of {self.ignored_inputs[0]}: no operator of ONNX multiplies such integers"
            )
        is_weight_only = added.kind in _PRODUCTS and not is_static and not integer_inputs(added)
        if added.quantized is not None and is_weight_only and added.quantized.bits <= 4:
            self.note(
                "onnxruntime rounds the inputs of int4 products to int8 unless the session option "
                "session.qdq_matmulnbits_accuracy_level is 1, which the check sets"
            )
        return stored

    @torch.no_grad()
    def finish(
        self, folder: Path, source: ExportSource, final: nn.Module, inputs: Mapping[str, torch.Tensor] | None
    ) -> None:
        import onnx

        from ds_compress.export.onnx_graph import quantize_graph

        model = self.float_model(folder, final)
        graph = exported(model, dict(inputs or example_inputs(model)))
        unquantized = quantize_graph(graph, self.quantized_layers, self.options.dtype)
        if unquantized:
            raise ExportError(
                f"{unquantized[0]}: its node was not found in the exported graph; {OTHER_FORMAT}"
            )
        onnx.save(graph, folder / FILE_NAME)
        onnx.checker.check_model(str(folder / FILE_NAME))


def integer_inputs(layer: Layer) -> bool:
    """Whether MatMulInteger multiplies its inputs, rounded per token, by its weight, as training did."""
    quantized, used = layer.quantized, layer.input
    return (
        quantized is not None
        and used is not None
        and used.input_range is None
        and layer.kind in _PRODUCTS
        and quantized.groups == 1
        and quantized.offset is None
        and used.grid.symmetric
        and used.grid.granularity is TokenGranularity.PER_TOKEN
    )


def exported(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """The onnx.ModelProto of a float model; batch and sequence length stay free."""
    program = torch.onnx.export(
        Positional(model, list(inputs)).eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes=(free_axes(inputs),),
        opset_version=_OPSET,
        verbose=False,
    )
    assert program is not None
    return program.model_proto
