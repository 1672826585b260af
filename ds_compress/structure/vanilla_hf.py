"""Whether vanilla HF (transformers without ds_compress) rebuilds a pruned model from its config: tried by building it.

Several architectures deduce the size of a head from hidden size and number of heads, so that a config with fewer
heads silently means wider ones; others have one config key for what differs from layer to layer. Neither is listed
here: the model class is built on the meta device from the updated config, and every shape and every number attribute
of its modules is compared.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.kinds import STEP_SIZE_SUFFIX, shape_of
from ds_compress.structure.apply_pruning import apply_pruning
from ds_compress.structure.pruning_plan import PruningPlan

_MOST = 8
_NUMBERS = (int, float, bool)
_FOR_TRAINING = ("training", "gradient_checkpointing")


def vanilla_hf_obstacles(model_or_config: Any, pruning_plan: PruningPlan | None = None) -> list[str]:
    """Why `type(model)(config)` is not the pruned model; empty when vanilla HF loads it.

    Args:
        model_or_config: the model before pruning, in any state of its weights (only its class, config and shapes
            are used), or its config with `architectures`. Without `pruning_plan`: a model that was pruned.
        pruning_plan: what it will lose.

    Returns:
        Sentences that name the module; at most eight, then how many more.
    """
    try:
        cls, config = _class_and_config(model_or_config)
    except ValueError as error:
        return [str(error)]
    if pruning_plan is None:
        expected, rewritten = model_or_config, config
    else:
        if not pruning_plan.active():
            return []
        expected = _built(cls, copy.deepcopy(config))
        if isinstance(model_or_config, nn.Module) and (already := _shapes(model_or_config, expected, cls)):
            # After an earlier pruning its config does not describe the model.
            return _first(already)
        apply_pruning(expected, pruning_plan, meta=True)
        rewritten = expected.config
    try:
        rebuilt = _built(cls, _as_loaded(rewritten))
    except Exception as error:  # whatever a model class finds wrong with a config
        return [f"{cls.__name__} refuses the config: {_one_line(error)}"]
    return _first([*_shapes(expected, rebuilt, cls), *_numbers(expected, rebuilt, cls)])


def differing_shapes(model: nn.Module) -> list[str]:
    """The obstacles that need no logits: tensors that a model built from the config lacks, or has in another shape.

    The others that `vanilla_hf_obstacles` finds, numbers and classes of modules, may not affect the logits.
    """
    try:
        cls, config = _class_and_config(model)
    except ValueError as error:
        return [str(error)]
    try:
        rebuilt = _built(cls, _as_loaded(config))
    except Exception as error:  # whatever a model class finds wrong with a config
        return [f"{cls.__name__} refuses the config: {_one_line(error)}"]
    return _first(_shapes(model, rebuilt, cls))


def _first(found: list[str]) -> list[str]:
    more = len(found) - _MOST
    return found[:_MOST] + ([f"and {more} more"] if more > 0 else [])


def _class_and_config(model_or_config: Any) -> tuple[type[nn.Module], Any]:
    if isinstance(model_or_config, nn.Module):
        config = getattr(model_or_config, "config", None)
        if config is None or not hasattr(config, "to_dict"):
            raise ValueError(f"a {type(model_or_config).__name__} has no config that could rebuild it")
        return type(model_or_config), config
    import transformers

    names = getattr(model_or_config, "architectures", None) or []
    cls = getattr(transformers, names[0], None) if names else None
    if cls is None:
        raise ValueError(f"the config names no class of transformers in architectures: {names}")
    return cls, model_or_config


def _built(cls: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config).eval()


def _as_loaded(config: Any) -> Any:
    """The config as it comes back from config.json."""
    return type(config).from_dict(json.loads(json.dumps(config.to_dict(), default=str)))


def _shapes(expected: nn.Module, rebuilt: nn.Module, cls: type[nn.Module]) -> list[str]:
    ours, theirs = _tensor_shapes(expected), _tensor_shapes(rebuilt)
    found = [
        f"{name} is missing from the {cls.__name__} that its config builds"
        for name in ours
        if name not in theirs
    ]
    found += [
        f"{name} is new in the {cls.__name__} that its config builds" for name in theirs if name not in ours
    ]
    for name, shape in ours.items():
        if theirs.get(name, shape) != shape:
            found.append(
                f"{name} is {list(shape)}, and {list(theirs[name])} in the {cls.__name__} that its config builds"
            )
    return found


def _tensor_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of all parameters and of the buffers that are saved; of nothing auxiliary."""
    shapes = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if is_auxiliary(prefix):
            continue
        if type(module) is not _vanilla_class(module) and not is_parametrized(module):
            # Vanilla classes have nothing that a quantizer has added.
            names = [name for name in _held(module) if not name.endswith(STEP_SIZE_SUFFIX)]
        else:
            names = _held(module)
        for name in names:
            shapes[f"{prefix}.{name}" if prefix else name] = shape_of(module.get_parameter(name))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                shapes[f"{prefix}.{name}" if prefix else name] = tuple(buffer.shape)
    return shapes


def _held(module: nn.Module) -> list[str]:
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def _numbers(expected: nn.Module, rebuilt: nn.Module, cls: type[nn.Module]) -> list[str]:
    found = []
    theirs = dict(rebuilt.named_modules())
    for name, module in expected.named_modules():
        other = theirs.get(name)
        if other is None or _is_dropout(module, other):
            continue
        if _vanilla_class(other) is not _vanilla_class(module):
            found.append(
                f"{name} is a {type(module).__name__}, and a {type(other).__name__} in the vanilla HF model"
            )
            continue
        for key, value in vars(module).items():
            theirs_value = getattr(other, key, value)
            # What is used in training only does not affect a trained model.
            if key[0] == "_" or "drop" in key or key in _FOR_TRAINING or not isinstance(value, _NUMBERS):
                continue
            if theirs_value != value:
                found.append(
                    f"{name}.{key} is {value}, and {theirs_value} in the {cls.__name__} that its config builds"
                )
    return found


def _is_dropout(module: nn.Module, other: nn.Module) -> bool:
    """Both are the identity in a trained model, also where a Dropout was replaced by an Identity."""
    return all(isinstance(m, nn.Identity) or "drop" in type(m).__name__.lower() for m in (module, other))


def _vanilla_class(module: nn.Module) -> type[nn.Module]:
    """The class of the module before this package, or a parametrization, swapped it."""
    if is_parametrized(module):  # each instance has a class of its own
        return type(module).__bases__[0]
    cls: type[nn.Module] = getattr(type(module), "_ds_compress_base_class", type(module))
    return cls


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
