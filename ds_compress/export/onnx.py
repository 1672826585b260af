"""`onnx`: quantize/dequantize pairs around the linear layers of an encoder, for onnxruntime and other runtimes.

The float model is exported, and each quantized weight is replaced by its integers with a DequantizeLinear (int4 where
4 bits suffice); a static input range becomes QuantizeLinear and DequantizeLinear. Per-token scales have no operator:
such inputs stay floats, which the report notes. Tables with one scale per row are looked up as integers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.attributes import attribute_overrides, restore
from ds_compress.export.format import OTHER_FORMAT, Format, empty_copy, is_hf_model
from ds_compress.export.inputs import example_inputs
from ds_compress.export.load import fill, meta_model
from ds_compress.export.quantized_matrix import quantize_rows
from ds_compress.export.read import Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.kinds import ModuleKind

FILE_NAME = "model.onnx"
_PRODUCTS = (ModuleKind.LINEAR, ModuleKind.CONV1D)


@dataclass
class OnnxFormat(Format):
    """Keeps the whole model in memory: a graph is exported at once."""

    name: ClassVar[str] = "onnx"
    loader: ClassVar[str] = "onnx"
    same_activations: bool = True
    has_shards: ClassVar[bool] = False

    layers: list[Layer] = field(default_factory=list)

    def check_source(self, source: ExportSource, final: nn.Module) -> None:
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ExportError(f'format "onnx" needs {error.name}: pip install "ds_compress[onnx]"') from error
        if generates(source.model):
            kind = type(source.model).__name__
            raise ExportError(
                f'format "onnx" is for encoders, and a {kind} generates, with a cache; {OTHER_FORMAT}'
            )

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        quantized = layer.quantized
        _refuse_floats(layer)
        is_table = layer.kind is ModuleKind.EMBEDDING and "weight" in layer.tensors
        if quantized is None and is_table and self.options.embeddings == "int8":
            quantized = quantize_rows(layer.tensors["weight"])
            self.rounded[layer.full("weight")] = quantized.dequantize()
            layer = Layer(layer.name, layer.kind, quantized, {}, layer.input, layer.ties)
        if layer.input is not None and layer.input.input_range is None:
            self.ignores_inputs = True
            self.note(
                "inputs with a range per token stay floats: no operator of ONNX rounds them as training did"
            )
        self.layers.append(layer)
        if quantized is not None:
            weight = {"type": "int", "bits": quantized.bits, "group_size": quantized.group_size}
            self.schemes[layer.name] = {"weight": weight}
        if (
            quantized is not None
            and layer.kind in _PRODUCTS
            and (layer.input is None or layer.input.input_range is None)
        ):
            self.note(
                "onnxruntime rounds the inputs of weight-only products to int8 unless the session option "
                "session.qdq_matmulnbits_accuracy_level is 1, which the check sets"
            )
        if layer.input is not None and layer.input.input_range is not None:
            self.schemes.setdefault(layer.name, {})["input"] = layer.input.as_json()
        return {}

    @torch.no_grad()
    def finish(
        self, folder: Path, source: ExportSource, final: nn.Module, inputs: Mapping[str, torch.Tensor] | None
    ) -> None:
        from ds_compress.export.onnx_graph import quantize_graph

        model = self._float_model(folder, final)
        graph = exported(model, dict(inputs or example_inputs(model)))
        unquantized = quantize_graph(graph, [layer for layer in self.layers if layer.quantized is not None])
        if unquantized:
            raise ExportError(
                f"{unquantized[0]}: its node was not found in the exported graph; {OTHER_FORMAT}"
            )
        import onnx

        onnx.save(graph, folder / FILE_NAME)
        onnx.checker.check_model(str(folder / FILE_NAME))

    def _float_model(self, folder: Path, final: nn.Module) -> nn.Module:
        if is_hf_model(final):
            model = meta_model(folder, type(final).__name__)
            restore(model, attribute_overrides(final, json_config(folder, final)))
        else:
            model = empty_copy(final)
        for layer in self.layers:
            values = dict(layer.tensors)
            if layer.quantized is not None:
                values["weight"] = layer.quantized.dequantize()
            fill(model.get_submodule(layer.name), values)
        for layer in self.layers:
            for local, first in layer.ties.items():
                model.get_submodule(layer.name)._parameters[local] = model.get_parameter(first)
        if any(layer.quantized is not None and layer.kind is ModuleKind.CONV2D for layer in self.layers):
            _keep_normalizations(model)
        return model.requires_grad_(False).eval()


class _Affine(nn.Module):
    """A BatchNorm2d of a trained model."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None and variance is not None
        factor = (variance + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight
        offset = -mean * factor if norm.bias is None else norm.bias - mean * factor
        self.register_buffer("factor", factor.detach().view(1, -1, 1, 1).clone())
        self.register_buffer("offset", offset.detach().view(1, -1, 1, 1).clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.offset  # type: ignore[operator]


def _refuse_floats(layer: Layer) -> None:
    formats = [] if layer.quantized is None else [layer.quantized.format]
    formats += [] if layer.input is None else [layer.input.grid.format]
    odd = [format for format in formats if format != "int"]
    if odd:
        raise ExportError(
            f'{layer.name} is quantized to {odd[0]}, and format "onnx" stores integers only: export it as '
            f'"compressed-tensors" or "hf"; {OTHER_FORMAT}'
        )


def _keep_normalizations(model: nn.Module) -> None:
    """The exporter would fold a BatchNorm into the convolution before it, which would then not be quantized."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and child.running_mean is not None:
                setattr(module, name, _Affine(child))


def generates(model: Any) -> bool:
    """Whether the model has a cache of keys and values, or a decoder beside its encoder."""
    is_pair = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return bool(is_pair or (hasattr(model, "can_generate") and model.can_generate()))


def json_config(folder: Path, final: nn.Module) -> Any:
    """The config that was written."""
    cls: Any = type(final)
    return cls.config_class.from_dict(json.loads((folder / "config.json").read_text()))


class _Positional(nn.Module):
    """The exporter needs positional arguments, and one tensor as the result."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        output = self.model(**dict(zip(self.names, values, strict=True)))
        if isinstance(output, torch.Tensor):
            return output
        result: torch.Tensor = output["logits"] if "logits" in output else output[0]
        return result


def _is_text(value: torch.Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()


def exported(model: nn.Module, inputs: dict[str, torch.Tensor]) -> Any:
    """The onnx.ModelProto of a float model; batch and sequence length stay free."""
    dynamic = torch.export.Dim.DYNAMIC
    axes = tuple({0: dynamic, 1: dynamic} if _is_text(value) else {0: dynamic} for value in inputs.values())
    program = torch.onnx.export(
        _Positional(model, list(inputs)).eval(),
        tuple(inputs.values()),
        input_names=list(inputs),
        output_names=["logits"],
        dynamo=True,
        dynamic_shapes=(axes,),
        opset_version=21,
        verbose=False,
    )
    assert program is not None
    return program.model_proto
