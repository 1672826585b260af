"""Rounding after training: an export of a model that was not quantized, by the name of a scheme.

Scales are the largest magnitudes, as nothing is calibrated; so schemes whose inputs need an observed range are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.quantized_experts import quantize_experts
from ds_compress.export.quantized_matrix import quantize_matrix
from ds_compress.export.read import InputScheme, Layer
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers
from ds_compress.quant.fake_quant import FakeQuantConfig
from ds_compress.quant.grid import ActivationGrid, Granularity, TokenGranularity, WeightGrid
from ds_compress.quant.qparams import global_scale_for
from ds_compress.quant.schemes import SCHEMES, QuantizerSpec, Scheme, scheme_named
from ds_compress.techniques.global_scales import fused_families

_HEADS = ("lm_head", "embed_out", "decoder")
_FP8 = "FP8"


def scheme_to_round_to(name: str | None, source: ExportSource) -> Scheme | None:
    """Raises ExportError for a name that there is not, or that an untrained model cannot be rounded to."""
    if name is None:
        return None
    if name.upper() == _FP8:  # the ranges of its inputs are not known, so they are measured
        name = "FP8_DYNAMIC"
    try:
        scheme = scheme_named(name)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if scheme.inputs is not None and scheme.inputs.static:
        fitting = ", ".join(n for n, s in SCHEMES.items() if s.inputs is None or not s.inputs.static)
        raise ExportError(
            f"scheme {scheme.name} needs observed ranges of inputs, which only training gives; one of {fitting} needs "
            "none"
        )
    if source.pruning_plan is not None and source.pruning_plan.active():
        raise ExportError(
            "scheme= rounds a finished model: structures are still masked, so export what finalize returns"
        )
    return scheme


def global_scales(source: ExportSource, scheme: Scheme | None) -> dict[str, torch.Tensor]:
    """fp32 (1,) by the name of the layer, for formats that have one: the same for layers that servers join.

    A collective where weights are sharded.
    """
    if scheme is None or scheme.weights is None or not _weight_grid(scheme.weights).has_global_scale:
        return {}
    largest = {
        name: module.get_parameter("weight").detach().float().abs().amax().cpu()
        for name, module in source.modules()
        if kind_of(module) is ModuleKind.LINEAR
    }
    grid, found = _weight_grid(scheme.weights), {}
    for members in fused_families(list(largest)):
        together = torch.stack([largest[name] for name in members]).amax()
        found.update(dict.fromkeys(members, global_scale_for(together, grid)))
    return found


def is_head(module: str) -> bool:
    """Whether a layer of this name makes logits over a vocabulary: it stays as it is."""
    return module.rpartition(".")[2] in _HEADS


def rounded(
    layer: Layer, scheme: Scheme, note: Callable[[str], None], global_scale: torch.Tensor | None = None
) -> Layer:
    """The layer on the grids of the scheme, where that has any for it: heads, tables and Conv1D stay as they are.

    Raises:
        ExportError: it is quantized already.
    """
    if layer.quantized is not None or layer.input is not None or layer.experts:
        raise ExportError(
            f"{layer.name} was trained quantized: scheme={scheme.name!r} is for models that were not, leave it out"
        )
    if layer.kind is not None and layer.kind.is_experts:
        return _rounded_experts(layer, scheme, note)
    if layer.kind is not ModuleKind.LINEAR or "weight" not in layer.tensors or is_head(layer.name):
        return layer
    weight = layer.tensors["weight"]
    specs = [spec for spec in (scheme.weights, scheme.inputs) if spec is not None]
    odd = [s.group_size for s in specs if s.group_size is not None and weight.shape[1] % s.group_size]
    if odd:
        note(
            f"{layer.name} is not quantized: its {weight.shape[1]} inputs are no multiple of the {odd[0]} of a group"
        )
        return layer
    note(
        f"{scheme.name}: weights are rounded after training"
        + (", and so are inputs" if scheme.inputs else "")
    )
    tensors = {name: tensor for name, tensor in layer.tensors.items() if name != "weight"}
    quantized = None
    if scheme.weights is not None:
        fake_quant = FakeQuantConfig(_weight_grid(scheme.weights), global_scale=global_scale)
        quantized = quantize_matrix(weight.float(), fake_quant)
    inputs = None if scheme.inputs is None else InputScheme(_input_grid(scheme.inputs))
    return replace(layer, quantized=quantized, tensors=tensors, input=inputs)


def _rounded_experts(layer: Layer, scheme: Scheme, note: Callable[[str], None]) -> Layer:
    """Fused experts, each matrix by itself; all of them or none."""
    assert layer.kind is not None
    matrices = {name: tensor for name, tensor in layer.tensors.items() if tensor.dim() == 3}
    axis = 1 if layer.kind.is_transposed else 2
    sizes = [s.group_size for s in (scheme.weights, scheme.inputs) if s is not None and s.group_size]
    for name, tensor in matrices.items():
        odd = [size for size in sizes if tensor.shape[axis] % size]
        if odd:
            note(
                f"{layer.full(name)} is not quantized: the {tensor.shape[axis]} inputs of its experts are no multiple "
                f"of the {odd[0]} of a group"
            )
            return layer
    if scheme.weights is None:
        return layer
    note(
        f"{scheme.name}: weights are rounded after training"
        + (", and so are inputs" if scheme.inputs else "")
    )
    grid = replace(_weight_grid(scheme.weights), stacked=True, channel_axis=int(layer.kind.is_transposed))
    experts = {
        name: quantize_experts(tensor.float(), FakeQuantConfig(grid)) for name, tensor in matrices.items()
    }
    inputs = {} if scheme.inputs is None else dict.fromkeys(matrices, InputScheme(_input_grid(scheme.inputs)))
    tensors = {name: tensor for name, tensor in layer.tensors.items() if name not in matrices}
    return replace(layer, tensors=tensors, experts=experts, expert_inputs=inputs)


@contextlib.contextmanager
def inputs_rounded(model: nn.Module, names: Sequence[str], scheme: Scheme | None) -> Iterator[None]:
    """The inputs of these modules are on the scheme's grid inside."""
    if scheme is None or scheme.inputs is None:
        yield
        return
    modules = [model.get_submodule(name) for name in names]
    plain = [module for module in modules if not isinstance(module, layers.QATModule)]
    for module in modules:
        layers.attach(module).input_quantizer = layers.InputQuantizer(
            _input_grid(scheme.inputs), enabled=True
        )
    try:
        yield
    finally:
        for module in modules:
            layers.attach(module).input_quantizer = None
        for module in plain:
            layers.detach(module)


def _weight_grid(spec: QuantizerSpec) -> WeightGrid:
    return WeightGrid(
        bits=spec.bits,
        narrow_range=spec.format == "int",
        format=spec.format,
        granularity=Granularity(spec.granularity),
        group_size=spec.group_size or WeightGrid.group_size,
    )


def _input_grid(spec: QuantizerSpec) -> ActivationGrid:
    return ActivationGrid(
        bits=spec.bits,
        narrow_range=spec.format == "int",
        format=spec.format,
        granularity=TokenGranularity(spec.granularity),
        group_size=spec.group_size or ActivationGrid.group_size,
    )
