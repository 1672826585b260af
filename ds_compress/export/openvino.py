"""`openvino`: an IR with the integers and scales of training, which stock OpenVINO runs without PyTorch.

The float model is traced and converted, and each quantized weight becomes a constant of integers (int4 where 4 bits
suffice) with the operations that dequantize it, which OpenVINO's CPU plugin keeps as integers. A static input range
becomes a FakeQuantize, from which its low-precision transformations make int8 products. Per-token ranges are a property
of the runtime, not of the graph, see `reload_openvino`; the report notes it.
"""

from __future__ import annotations

import logging
import warnings
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

FILE_NAME = "model.xml"
"""Of the graph, by the name that `optimum-intel` calls `openvino_model.xml` looks different only in its stem."""


@dataclass
class OpenVinoFormat(GraphFormat):
    """Keeps the whole model in memory: a graph is traced at once."""

    name: ClassVar[str] = "openvino"
    loader: ClassVar[str] = "openvino"
    packages: ClassVar[Sequence[str]] = ("openvino",)

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        stored = super().tensors(layer)
        if layer.input is not None and layer.input.input_range is None:
            self.ignored_inputs.append(layer.name)
            self.note(
                "inputs with a range per token are floats in the graph: OpenVINO rounds them, in groups, where its "
                "property DYNAMIC_QUANTIZATION_GROUP_SIZE is not 0; the check sets 0"
            )
        return stored

    @torch.no_grad()
    def finish(
        self, folder: Path, source: ExportSource, final: nn.Module, inputs: Mapping[str, torch.Tensor] | None
    ) -> None:
        import openvino

        from ds_compress.export.openvino_graph import quantize_graph

        model = self.float_model(folder, final)
        given = dict(inputs or example_inputs(model))
        graph, places = converted(model, given)
        unquantized = quantize_graph(graph, places, self.quantized_layers, self.options.dtype)
        if unquantized:
            raise ExportError(
                f"{unquantized[0]}: its operation was not found in the converted graph; {OTHER_FORMAT}"
            )
        # compress_to_fp16 would round what training kept in fp32.
        openvino.save_model(graph, folder / FILE_NAME, compress_to_fp16=False)


def converted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, list[str]]]:
    """The openvino.Model of a float model, and {module: names of its products in the graph}.

    Batch and sequence length stay free; inputs have the names of `inputs`, the output is "logits".
    """
    import openvino

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Positional(model, list(inputs)).eval(),
            tuple(inputs.values()),
            dynamic_shapes=(free_axes(inputs),),
        )
        graph = openvino.convert_model(program)
    for entry, (name, value) in zip(graph.inputs, inputs.items(), strict=True):
        entry.get_tensor().set_names({name})
        entry.get_node().set_friendly_name(name)
        shape = openvino.PartialShape([*value.shape])
        for axis in free_axes({name: value})[0]:
            shape[axis] = openvino.Dimension()
        entry.get_node().set_partial_shape(shape)
    graph.outputs[0].get_tensor().set_names({"logits"})
    graph.validate_nodes_and_infer_types()
    return graph, _places(program)


def _places(program: Any) -> dict[str, list[str]]:
    """The converter names an operation "<node>/<target>/<operation>" after the node of the traced program."""
    found: dict[str, list[str]] = {}
    for node in program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op == "call_function" and stack:
            path = str(stack[-1][0]).split("@")[0]
            found.setdefault(path.removeprefix("model."), []).append(node.name)
    return found
