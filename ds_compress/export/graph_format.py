"""What the formats `onnx` and `openvino` have in common: a graph of the float model, in which integers replace weights.

The whole model is kept in memory, because a graph is traced at once. Tables that were not trained in integers are
rounded to int8, one scale per row, unless `embeddings="float"` is given: they are most of a small encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.attributes import attribute_overrides, restore
from ds_compress.export.format import OTHER_FORMAT, Format, empty_copy, is_hf_model
from ds_compress.export.load import fill, meta_model
from ds_compress.export.quantized_matrix import quantize_rows
from ds_compress.export.read import Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.kinds import ModuleKind

GRAPHS = ("onnx", "openvino")
"""The formats of this kind, by name."""


@dataclass
class GraphFormat(Format):
    """layers: all that were read, in the order of the model; their tensors are what the graph will hold.

    packages: what the format needs beside torch, by import name.
    """

    loads_in_vanilla_hf: ClassVar[bool] = True
    has_shards: ClassVar[bool] = False
    packages: ClassVar[Sequence[str]] = ()
    same_activations: bool = True

    layers: list[Layer] = field(default_factory=list)

    def check_source(self, source: ExportSource, final: nn.Module) -> None:
        for package in self.packages:
            try:
                import_module(package)
            except ImportError as error:
                raise ExportError(
                    f'format "{self.name}" needs {error.name}: pip install "ds_compress[{self.name}]"'
                ) from error
        if generates(source.model):
            kind = type(source.model).__name__
            raise ExportError(
                f'format "{self.name}" is for encoders, and a {kind} generates, with a cache; {OTHER_FORMAT}'
            )
        if self.options.embeddings not in (None, "int8", "float"):
            raise ExportError(f'embeddings is "int8" or "float", got {self.options.embeddings!r}')

    def tensors(self, layer: Layer) -> dict[str, torch.Tensor]:
        self._refuse_floats(layer)
        quantized, plain = layer.quantized, {name: self.cast(value) for name, value in layer.tensors.items()}
        is_table = layer.kind is ModuleKind.EMBEDDING and "weight" in layer.tensors
        if quantized is None and is_table and self.options.embeddings != "float":
            quantized = quantize_rows(layer.tensors["weight"])
            self.rounded[layer.full("weight")] = quantized.dequantize()
            self.note("embeddings that were not trained in integers are rounded to int8, one scale per row")
            del plain["weight"]
        layer = Layer(layer.name, layer.kind, quantized, plain, layer.input, layer.ties)
        self.layers.append(layer)
        if quantized is not None:
            weight = {"type": "int", "bits": quantized.bits, "group_size": quantized.group_size}
            self.schemes[layer.name] = {"weight": weight}
        if layer.input is not None and layer.input.input_range is not None:
            self.schemes.setdefault(layer.name, {})["input"] = layer.input.as_json()
        return {}

    def _refuse_floats(self, layer: Layer) -> None:
        formats = [] if layer.quantized is None else [layer.quantized.format]
        formats += [] if layer.input is None else [layer.input.grid.format]
        odd = [format for format in formats if format != "int"]
        if odd:
            raise ExportError(
                f'{layer.name} is quantized to {odd[0]}, and format "{self.name}" stores integers only: export it as '
                f'"compressed-tensors" or "hf"; {OTHER_FORMAT}'
            )

    def float_model(self, folder: Path, final: nn.Module) -> nn.Module:
        """The trained model in fp32 with the values that its integers stand for, in eval mode."""
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
        if getattr(getattr(model, "config", None), "use_cache", None):
            model.config.use_cache = False  # type: ignore[union-attr]
        return model.requires_grad_(False).eval()

    @property
    def quantized_layers(self) -> list[Layer]:
        """Those whose weight the graph holds as integers."""
        return [layer for layer in self.layers if layer.quantized is not None]


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


def _keep_normalizations(model: nn.Module) -> None:
    """An exporter would fold a BatchNorm into the convolution before it, which would then not be quantized."""
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


class Positional(nn.Module):
    """A model with positional arguments and one tensor as its result, which exporters want."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        output = self.model(**dict(zip(self.names, values, strict=True)))
        if isinstance(output, torch.Tensor):
            return output
        result: torch.Tensor = output["logits"] if "logits" in output else output[0]
        return result


def free_axes(inputs: dict[str, torch.Tensor]) -> tuple[dict[int, Any], ...]:
    """Axes of each input that stay free in the graph: the batch, and of tokens their number."""
    dynamic = torch.export.Dim.DYNAMIC
    return tuple({0: dynamic, 1: dynamic} if _is_text(value) else {0: dynamic} for value in inputs.values())


def _is_text(value: torch.Tensor) -> bool:
    return value.dim() == 2 and not value.is_floating_point()
