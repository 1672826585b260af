"""The helpers of the removed library: names of nested modules, Conv1D to Linear, single layers prepared and fixed.

`module_replacement`, `compression_preparation` and `fix_compression` were the inside of `init_compression` and
`redundancy_clean`. They do the same for single layers here: what they are asked for becomes a block, under which the
model waits for an engine or a scheduler like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_compress.compat import basic_layer
from ds_compress.compat.basic_layer import is_module_compressible
from ds_compress.compat.compress import prepare, unwrapped
from ds_compress.compat.config import SHARED_KEYS, block_of_config
from ds_compress.compat.constants import (
    CHANNEL_PRUNING,
    DIFFERENT_GROUPS,
    HEAD_PRUNING,
    ROW_PRUNING,
    SHARED_PARAMETERS,
    SPARSE_PRUNING,
    TECHNIQUE_ENABLED,
    WEIGHT_QUANTIZATION,
)
from ds_compress.engine.registry import run_of
from ds_compress.errors import ConfigError, Problem, dotted, shown
from ds_compress.modelinfo.inventory import exact_pattern
from ds_compress.modelinfo.kinds import ModuleKind, kind_of
from ds_compress.quant import layers

Techniques = Mapping[str, Mapping[str, Any]]
_PARAMS = ("start_bits", "target_bits", "quantization_period", "bits", "format", "earlier_formats")
_DIMENSION_OF_OUTPUTS = 0


def recursive_getattr(model: Any, module_name: str) -> Any:
    """The attribute at a dotted path; raises AttributeError with the first name that is not there."""
    for name in module_name.split("."):
        model = getattr(model, name)
    return model


def recursive_setattr(model: Any, module_name: str, module: Any) -> None:
    """Sets the attribute at a dotted path; raises AttributeError when something on the way is not there."""
    parent, _, name = module_name.rpartition(".")
    setattr(recursive_getattr(model, parent) if parent else model, name, module)


def convert_conv1d_to_linear(model: Any, convert_type: type[nn.Module]) -> Any:
    """Replaces every module of class `convert_type` (transformers' Conv1D) by an nn.Linear of the same function.

    Conv1D stores `[in, out]`. Device, dtype, `requires_grad` and train or eval mode stay; one module under several
    names stays one. The model that was given is changed and returned. (Blocks of this library treat Conv1D
    as it is: conversion is not needed.)

    Raises:
        ValueError: the weight is partitioned by ZeRO-3, or another module shares it, which a transposed copy cannot.
    """
    inner = unwrapped(model)
    users: dict[int, list[str]] = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        users.setdefault(id(parameter), []).append(name)
    converted: dict[int, nn.Linear] = {}
    for name, module in list(inner.named_modules(remove_duplicate=False)):
        if not isinstance(module, convert_type):
            continue
        if id(module) not in converted:
            _check_convertible(inner, name, module, users)
            converted[id(module)] = _linear_of(module)
        recursive_setattr(inner, name, converted[id(module)])
    return model


def _check_convertible(
    model: nn.Module, name: str, module: nn.Module, users: Mapping[int, list[str]]
) -> None:
    weight = module.get_parameter("weight")
    if hasattr(weight, "ds_id"):
        raise ValueError(f"{name}: convert before zero.Init or deepspeed.initialize partition the model")
    owners = {id(model.get_submodule(user.rpartition(".")[0])) for user in users[id(weight)]}
    if len(owners) > 1:
        raise ValueError(
            f"{name}.weight is shared with {', '.join(users[id(weight)])}: it cannot be transposed alone"
        )


@torch.no_grad()
def _linear_of(module: nn.Module) -> nn.Linear:
    weight, bias = module.get_parameter("weight"), module._parameters.get("bias")
    inputs, outputs = weight.shape
    linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.t().contiguous(), requires_grad=weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.view(-1).clone(), requires_grad=bias.requires_grad)
    return linear.train(module.training)


def module_replacement(
    model: nn.Module, module_name: str, compression_technique: Techniques | None = None, mpu: Any = None
) -> None:
    """Prepares one layer, in place: with `{technique: settings}` as `get_compress_methods` gives them, or, without
    a technique, only so that it is an instance of its `..._Compress` class.

    Raises:
        ConfigError: settings that do not fit the layer or what was asked before; AttributeError: no such module.
    """
    module = recursive_getattr(model, module_name)
    if compression_technique is None:
        basic_layer.mark(module)
        return
    compression_preparation(model, [[[[module_name]], [], compression_technique]], mpu)


def compression_preparation(
    model: nn.Module, compression_technique_list: Iterable[Sequence[Any]], mpu: Any = None
) -> nn.Module:
    """Prepares layers as a list from `get_compress_methods` says; what was asked for before stays in force.

    Raises:
        ConfigError: settings that do not fit, or the model is in training already.
    """
    run = run_of(model)
    if run is not None and run.is_attached:
        raise ConfigError(
            [Problem(dotted(), "a model in training", "one that waits for its engine or scheduler")]
        )
    block = copy.deepcopy(dict(run.block)) if run is not None else {}
    before = copy.deepcopy(block)
    for names, related, techniques in compression_technique_list:
        for technique, settings in techniques.items():
            if settings.get(TECHNIQUE_ENABLED):
                _add_group(block, technique, settings, names, related)
    if block != before:
        if run is not None:
            run.detach()
        prepare(model, block)
    return model


def _add_group(
    block: dict[str, Any],
    technique: str,
    settings: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    related: Sequence[Sequence[Sequence[str]]],
) -> None:
    if technique not in SHARED_KEYS:
        raise ConfigError([Problem(dotted(), shown(technique), f"one of {', '.join(SHARED_KEYS)}")])
    params = {key: value for key, value in settings.items() if key in _PARAMS}
    shared = {key: value for key, value in settings.items() if key not in _PARAMS}
    if "dense_ratio" in shared:
        params["dense_ratio"] = shared.pop("dense_ratio")
    written = block_of_config({technique: {SHARED_PARAMETERS: shared}}) or {}
    own = block.setdefault(technique, {**written[technique], DIFFERENT_GROUPS: {}})
    if own[SHARED_PARAMETERS] != written[technique][SHARED_PARAMETERS]:
        path = dotted(technique, SHARED_PARAMETERS)
        raise ConfigError([Problem(path, shown(shared), "the same for all layers of a model")])
    group: dict[str, Any] = {"params": params, "modules": [_any_of(found) for found in names if found]}
    if related:
        group["related_modules"] = [[_any_of(found) for found in one] for one in related]
    own[DIFFERENT_GROUPS][f"group_{len(own[DIFFERENT_GROUPS])}"] = group


def _any_of(names: Sequence[str]) -> str:
    exact = [exact_pattern(name) for name in names]
    return exact[0] if len(exact) == 1 else "|".join(exact)


@torch.no_grad()
def fix_compression(
    model: nn.Module,
    module_name: str,
    compression_technique: Techniques,
    mask: torch.Tensor | None = None,
    dim_reduction: bool = False,
) -> torch.Tensor | None:
    """Makes one technique final in one layer of a model that is whole in this process.

    - `weight_quantization` in forward: the weight takes the values that forward computed with; its quantizer goes.
    - `sparse_pruning`: nothing is left to do, the weight has its zeros since the optimizer's step.
    - `row_pruning`, `channel_pruning`, `head_pruning`: with `dim_reduction` the units are cut off the layer, and the
      bool mask (units,) of what was kept is returned; with that `mask` the layer that reads them, or for heads
      writes them, is cut. Without `dim_reduction` units stay zero.

    Raises:
        ValueError: units are to be cut, and the model has no mask of this layer.
    """
    module = recursive_getattr(model, module_name)
    for technique in compression_technique:
        if technique == WEIGHT_QUANTIZATION:
            _fix_quantization(module)
        elif technique in (ROW_PRUNING, CHANNEL_PRUNING, HEAD_PRUNING) and dim_reduction:
            is_head = technique == HEAD_PRUNING
            if mask is not None:
                _cut(module, mask.view(-1), dimension=0 if is_head else 1)
                return None
            units = _units_of(model, technique, module_name)
            _cut(module, units, dimension=1 if is_head else 0)
            return units
        elif technique not in (SPARSE_PRUNING, *SHARED_KEYS):
            raise ValueError(f"{technique}: not one of {', '.join(SHARED_KEYS)}")
    return None


def _fix_quantization(module: nn.Module) -> None:
    if not isinstance(module, layers.QATModule):
        return
    for name, quantizer in list(module.weight_quantizers()):
        if quantizer.fake_quant is not None:
            module.get_parameter(name).copy_(layers.quantized_weight(module, name))
        module.set_weight_quantizer(name, None)
    layers.detach(module)


def _units_of(model: nn.Module, technique: str, module_name: str) -> torch.Tensor:
    run = run_of(model)
    pruning: Any = run.techniques.get(technique) if run is not None else None
    for name, structure in (pruning.structures if pruning is not None else {}).items():
        scored = {member.tensor.rpartition(".")[0] for member in structure.slices if member.scored}
        if module_name in scored and name in pruning.kept:
            units = torch.zeros(structure.units, dtype=torch.bool)
            units[pruning.kept[name]] = True
            return units
    raise ValueError(f"{technique} has no mask of {module_name!r}: train past its schedule_offset first")


def _cut(module: nn.Module, units: torch.Tensor, dimension: int) -> None:
    """Keeps the slices of a layer that belong to the kept units; new parameters, sizes rewritten."""
    if isinstance(module, nn.BatchNorm2d):
        dimension = 0
    elif kind_of(module) is ModuleKind.CONV1D:
        dimension = 1 - dimension
    for key in ("weight", "bias", "running_mean", "running_var"):
        tensor = getattr(module, key, None)
        if tensor is None or (key != "weight" and dimension != _outputs(module)):
            continue
        kept = units.repeat_interleave(tensor.shape[dimension if key == "weight" else 0] // units.numel())
        index = kept.nonzero().flatten().to(tensor.device)
        cut = tensor.detach().index_select(dimension if key == "weight" else 0, index)
        is_parameter = isinstance(tensor, nn.Parameter)
        setattr(module, key, nn.Parameter(cut, requires_grad=tensor.requires_grad) if is_parameter else cut)
    _rewrite_sizes(module)


def _outputs(module: nn.Module) -> int:
    return 1 if kind_of(module) is ModuleKind.CONV1D else _DIMENSION_OF_OUTPUTS


def _rewrite_sizes(module: nn.Module) -> None:
    weight: Any = module.weight
    if isinstance(module, nn.BatchNorm2d):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.Conv2d):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif kind_of(module) is ModuleKind.CONV1D:
        module.nx, module.nf = weight.shape


__all__ = [
    "compression_preparation",
    "convert_conv1d_to_linear",
    "fix_compression",
    "is_module_compressible",
    "module_replacement",
    "recursive_getattr",
    "recursive_setattr",
]
