"""The modules of a trained model, one by one, as what an export stores of them."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ds_compress.errors import ExportError
from ds_compress.export.quantized_experts import QuantizedExperts, quantize_experts
from ds_compress.export.quantized_matrix import QuantizedMatrix, matrix_of, quantize_matrix
from ds_compress.export.source import ExportSource
from ds_compress.modelinfo.experts import fused_experts
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers
from ds_compress.quant.grid import ActivationGrid, TokenGranularity
from ds_compress.quant.packed_weight import BUFFERS, packed_weight_of


@dataclass(frozen=True)
class InputScheme:
    """How a layer's input is quantized in inference; input_range: fp32 (min, max) of a static grid.

    Integers have no "format" in JSON, as in folders that were written before there were floats.
    """

    grid: ActivationGrid
    input_range: torch.Tensor | None = None

    def as_json(self) -> dict[str, Any]:
        grid = self.grid
        floats = {} if grid.format == "int" else {"format": grid.format, "group_size": grid.group_size}
        return floats | {
            "bits": grid.bits,
            "symmetric": grid.symmetric,
            "narrow_range": grid.narrow_range,
            "granularity": grid.granularity.value,
            "range": None if self.input_range is None else self.input_range.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> InputScheme:
        grid = ActivationGrid(
            bits=data["bits"],
            symmetric=data["symmetric"],
            narrow_range=data["narrow_range"],
            granularity=TokenGranularity(data["granularity"]),
            static=data["range"] is not None,
            format=data.get("format", "int"),
            group_size=data.get("group_size", ActivationGrid.group_size),
        )
        return cls(grid, None if data["range"] is None else torch.tensor(data["range"]))


@dataclass(frozen=True)
class Layer:
    """What one module stores.

    name: after pruning. quantized: its weight, where that is quantized. tensors: everything else by its name in the
    module; CPU. ties: those that are tensors of an earlier module, by their full name there. split_from: the tied
    weight's other name where only one of its layers quantizes it, so that it has two values. experts: quantized stacks
    of fused experts by their names in the module; expert_inputs: how the inputs of these are quantized, a static range
    is (experts, 2).
    """

    name: str
    kind: ModuleKind | None
    quantized: QuantizedMatrix | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    input: InputScheme | None = None
    ties: dict[str, str] = field(default_factory=dict)
    split_from: str = ""
    experts: dict[str, QuantizedExperts] = field(default_factory=dict)
    expert_inputs: dict[str, InputScheme] = field(default_factory=dict)

    def full(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name


def read_layers(source: ExportSource) -> Generator[Layer, None, ExportError | None]:
    """Every module that stores something. A collective where weights are sharded.

    In processes that do not write, the layers are empty. Iterates over all modules whatever happens, because other
    processes do, and returns the first failure, with the name of its module: a weight that has no integers.
    """
    failure: ExportError | None = None
    seen: dict[int, tuple[str, tuple[Any, ...]]] = {}
    tied = _with_several_users(source.model)
    for name, module in source.modules():
        if not source.writes:
            yield Layer(name, None)
        elif failure is None:
            try:
                layer = _read(source, name, module, seen, tied)
            except (ExportError, ValueError) as error:
                failure = error if isinstance(error, ExportError) else ExportError(f"{name}: {error}")
                continue
            if layer is not None:
                yield layer
    return failure


def _read(
    source: ExportSource,
    name: str,
    module: nn.Module,
    seen: dict[int, tuple[str, tuple[Any, ...]]],
    tied: set[int],
) -> Layer | None:
    pruning_plan = source.pruning_plan

    def cut(full: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return (
            (lambda t: t)
            if pruning_plan is None
            else (lambda t: pruning_plan.prune_tensor(full, t, is_weight=False))
        )

    prefix = f"{name}." if name else ""
    new_name = name
    if pruning_plan is not None:
        renamed = pruning_plan.renamed(f"{prefix}x")
        if renamed is None:
            return None
        new_name = renamed.rpartition(".")[0]
    quantized, split_from = None, ""
    tensors: dict[str, torch.Tensor] = {}
    ties: dict[str, str] = {}
    experts: dict[str, QuantizedExperts] = {}
    quantized_parameters = layers.quantized_parameters(module)
    for local, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        if layers.is_step_size(local):
            continue
        fake_quant = quantized_parameters.get(local)
        is_quantized = fake_quant is not None
        step_size = module._parameters.get(layers.step_size_name(local)) if is_quantized else None
        how = (fake_quant if is_quantized else None, id(step_size))
        if id(parameter) in tied:
            first, how_first = seen.setdefault(id(parameter), (prefix + local, how))
            if first != prefix + local:
                if how == how_first and not split_from:
                    ties[local] = first if pruning_plan is None else str(pruning_plan.renamed(first))
                    continue
                # Its other tensors (BERT's decoder has a tied bias, too) are untied with it.
                split_from = split_from or first
        if is_quantized and fake_quant is not None:
            used = step_size if fake_quant.grid.learned else None
            try:
                if fake_quant.grid.stacked:
                    found = quantize_experts(parameter.detach(), fake_quant, used)
                    experts[local] = found.cut(cut(prefix + local))
                else:
                    quantized = quantize_matrix(parameter.detach(), fake_quant, used).cut(cut(prefix + local))
            except ValueError as error:
                where = f"{name}.{local}" if fake_quant.grid.stacked else name
                raise ExportError(f"{where}: {error}") from error
        else:
            full = parameter.detach()
            left = full if pruning_plan is None else pruning_plan.prune_tensor(prefix + local, full)
            tensors[local] = left.to("cpu", copy=True).contiguous()
    packed = packed_weight_of(module)
    if packed is not None:
        quantized = matrix_of(packed.quantized(module)).cut(cut(f"{prefix}weight"))
    for local, buffer in module.named_buffers(recurse=False):
        if local not in module._non_persistent_buffers_set and not (packed is not None and local in BUFFERS):
            left = buffer if pruning_plan is None else pruning_plan.prune_tensor(prefix + local, buffer)
            tensors[local] = left.detach().to("cpu", copy=True).contiguous()
    if quantized is None and not tensors and not ties and not experts:
        return None
    inputs = _input_schemes(module)
    if pruning_plan is not None and fused_experts(module):
        for local, own in inputs.items():
            if own.input_range is not None:
                left = pruning_plan.kept_experts(prefix + local, own.input_range)
                inputs[local] = InputScheme(own.grid, left)
    scheme = None if fused_experts(module) else inputs.pop(layers.WEIGHT, None)
    return Layer(new_name, _kind(module), quantized, tensors, scheme, ties, split_from, experts, inputs)


def _kind(module: nn.Module) -> ModuleKind | None:
    layout = fused_experts(module)
    if layout is None:
        return kind_of(module)
    return ModuleKind.TRANSPOSED_EXPERTS if layout.transposed else ModuleKind.EXPERTS


def _input_schemes(module: nn.Module) -> dict[str, InputScheme]:
    """By the local name of the weight."""
    found = {name: _input_scheme(quantizer) for name, quantizer in layers.input_quantizers_of(module).items()}
    return {name: scheme for name, scheme in found.items() if scheme is not None}


def _input_scheme(quantizer: layers.InputQuantizer) -> InputScheme | None:
    if not quantizer.enabled:
        return None
    if quantizer.grid.static and quantizer.input_range is None:
        if quantizer.grid.format != "int":
            raise ValueError(
                f"its input is to be quantized to {quantizer.grid.describe()} and was never observed: run forwards in "
                "training mode first"
            )
        return None  # nothing was seen yet: inputs pass as they are
    given = quantizer.input_range if quantizer.grid.static else None
    return InputScheme(quantizer.grid, None if given is None else given.detach().float().cpu())


def _with_several_users(model: nn.Module) -> set[int]:
    seen: set[int] = set()
    several: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (several if id(parameter) in seen else seen).add(id(parameter))
    return several
