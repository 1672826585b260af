"""`openvino`: an IR with the integers and scales of training, which stock OpenVINO runs without PyTorch.

The float model is traced and converted, and each quantized weight becomes a constant of integers (int4 where 4 bits
suffice) with the operations that dequantize it, which OpenVINO's CPU plugin keeps as integers. A static input range
becomes a FakeQuantize, from which its low-precision transformations make int8 products. Ranges per token are a property
of the runtime, not of the graph; the file has its value.
"""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
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
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant.grid import TokenGranularity

FILE_NAME = "model.xml"
_PRODUCTS = (ModuleKind.LINEAR, ModuleKind.CONV1D)
_ALIGNED = 16  # of groups that OpenVINO's kernels round by themselves


@dataclass
class OpenVinoFormat(GraphFormat):
    """Keeps the whole model in memory: a graph is traced at once."""

    name: ClassVar[str] = "openvino"
    loader: ClassVar[str] = "openvino"
    packages: ClassVar[Sequence[str]] = ("openvino",)

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        stored = super().tensors(layer)
        rounding = self._dynamic_inputs()
        self.same_activations = rounding == 0
        self.ignored_inputs = (
            [] if rounding else [each.name for each in self.layers if _has_dynamic_input(each)]
        )
        return stored

    def _dynamic_inputs(self) -> int:
        """Of how many columns OpenVINO rounds inputs together, for all products without a static range; 0: it does not.

        One property decides for a whole model. A group must divide all inputs, so that it is a part of a token.
        """
        size = 0
        for layer in self.layers:
            if layer.input is not None and layer.input.input_range is not None:
                continue
            quantized = layer.quantized
            if layer.input is None:
                if quantized is not None and layer.kind in _PRODUCTS:
                    return 0  # trained without rounding of its inputs
                continue
            grid = layer.input.grid
            is_like = grid.symmetric and grid.bits == 8 and grid.granularity is TokenGranularity.PER_TOKEN
            if not is_like or quantized is None or layer.kind not in _PRODUCTS:
                return 0
            size = math.gcd(size, quantized.values.shape[1] // quantized.groups)
        return 0 if size % _ALIGNED else size

    def _products(self) -> list[Layer]:
        return [layer for layer in self.quantized_layers if layer.kind in _PRODUCTS]

    def _note_inputs(self) -> None:
        size = self._dynamic_inputs()
        if size:
            self.note(
                f"inputs that are rounded per token have one scale for {size} of their columns: that is OpenVINO's "
                "DYNAMIC_QUANTIZATION_GROUP_SIZE in the file; a CPU without a kernel for it leaves them floats"
            )
        elif self.ignored_inputs:
            self.note(
                f"inputs with a range that is not static stay floats, as those of {self.ignored_inputs[0]}: OpenVINO "
                "rounds either all of them per token or none"
            )
        is_static = all(
            layer.input is not None and not _has_dynamic_input(layer) for layer in self._products()
        )
        if not size and not is_static:
            self.note(
                "OpenVINO rounds the inputs of products without a static range to int8, in groups of 32 columns, "
                "unless its property DYNAMIC_QUANTIZATION_GROUP_SIZE is 0, which the check sets"
            )

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
        self._note_inputs()
        size = self._dynamic_inputs()
        if size:
            graph.set_rt_info(str(size), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        # compress_to_fp16 would round what training kept in fp32.
        openvino.save_model(graph, folder / FILE_NAME, compress_to_fp16=False)


def _has_dynamic_input(layer: Layer) -> bool:
    return layer.input is not None and layer.input.input_range is None


def converted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, list[str]]]:
    """The openvino.Model of a float model, and {module: names of its products in the graph}.

    Batch and sequence length stay free; inputs have the names of `inputs`, the output is "logits".
    """
    import openvino
    from openvino._offline_transformations import apply_moc_transformations
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Positional(model, list(inputs)).eval(),
            tuple(inputs.values()),
            dynamic_shapes=(free_axes(inputs),),
        )
        with _quiet():
            decoder = TorchFXPythonDecoder.from_exported_program(program)
    # The steps of openvino.convert_model, which would tell its makers of each conversion over the network.
    frontend = FrontEndManager().load_by_framework("pytorch")
    graph = openvino.Model(frontend.convert(frontend.load(decoder)))
    if not any(kind_of(module) in (ModuleKind.CONV1D, ModuleKind.CONV2D) for module in model.modules()):
        # A smaller graph; it would transpose the weight of a Conv1D, and fold a multiplication into the convolution
        # before it.
        apply_moc_transformations(graph, cf=False, smart_reshape=True)
    for entry, (name, value) in zip(graph.inputs, inputs.items(), strict=True):
        entry.get_tensor().set_names({name})
        entry.get_node().set_friendly_name(name)
        shape = openvino.PartialShape([*value.shape])
        for axis in free_axes({name: value})[0]:
            shape[axis] = openvino.Dimension()
        entry.get_node().set_partial_shape(shape)
    graph.outputs[0].get_tensor().set_names({"logits"})
    graph.validate_nodes_and_infer_types()
    return graph, _places(decoder.pt_module.graph)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings with a traceback for each operator that a version of torch does not have."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)


def _places(traced: Any) -> dict[str, list[str]]:
    """The converter names an operation "<node>/<target>/<operation>" after the node of the traced graph."""
    found: dict[str, list[str]] = {}
    for node in traced.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if node.op == "call_function" and stack:
            path = str(stack[-1][0]).split("@")[0]
            found.setdefault(path.removeprefix("model."), []).append(node.name)
    return found
