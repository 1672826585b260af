"""Whether stock transformers would rebuild a cut model from its config, found out by building it.

Several architectures deduce the size of a head from hidden size and number of heads, so that a config with fewer
heads silently means wider ones; others have one config key for what differs from layer to layer. Neither is listed
here: the model class builds itself on the meta device from the rewritten config, and every shape and every number
that its modules keep is compared.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ds_compress.modelinfo.auxiliary import is_auxiliary
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.pruning_plan import PruningPlan

_MOST = 8
_NUMBERS = (int, float, bool)
_FOR_TRAINING = ("training", "gradient_checkpointing")


def stock_obstacles(model_or_config: Any, cuts: PruningPlan | None = None) -> list[str]:
    """Why `type(model)(config)` is not the cut model; empty when stock transformers loads it.

    Args:
        model_or_config: the model before the cut, in any state of its weights (only its class, config and shapes
            are used), or its config with `architectures`. Without `cuts`: a model that was cut, as it is.
        cuts: what it will lose.

    Returns:
        Sentences that name the module; at most eight, then how many more.
    """
    try:
        cls, config = _class_and_config(model_or_config)
    except ValueError as error:
        return [str(error)]
    if cuts is None:
        expected, rewritten = model_or_config, config
    else:
        if not cuts.active():
            return []
        expected = _built(cls, copy.deepcopy(config))
        if isinstance(model_or_config, nn.Module) and (already := _shapes(model_or_config, expected, cls)):
            # An earlier cut has left a model that its config does not describe.
            return _first(already)
        cuts.rewrite(expected, skeleton=True)
        rewritten = expected.config
    try:
        rebuilt = _built(cls, _as_loaded(rewritten))
    except Exception as error:  # whatever a model class finds wrong with a config
        return [f"{cls.__name__} refuses the config: {_one_line(error)}"]
    return _first([*_shapes(expected, rebuilt, cls), *_numbers(expected, rebuilt, cls)])


def other_shapes(model: nn.Module) -> list[str]:
    """The obstacles that no logits need to decide: tensors that a model built from the config lacks or has otherwise.

    What else `stock_obstacles` finds, numbers and classes of modules, may be of no matter to what the model computes.
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
        if type(module) is not _stock_class(module) and not is_parametrized(module):
            # What a quantizer has added is not for stock classes.
            names = [name for name in ("weight", "bias") if module._parameters.get(name) is not None]
        else:
            names = [name for name, p in module._parameters.items() if p is not None]
        for name in names:
            shapes[f"{prefix}.{name}" if prefix else name] = shape_of(module.get_parameter(name))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                shapes[f"{prefix}.{name}" if prefix else name] = tuple(buffer.shape)
    return shapes


def _numbers(expected: nn.Module, rebuilt: nn.Module, cls: type[nn.Module]) -> list[str]:
    found = []
    theirs = dict(rebuilt.named_modules())
    for name, module in expected.named_modules():
        other = theirs.get(name)
        if other is None or _is_dropout(module, other):
            continue
        if _stock_class(other) is not _stock_class(module):
            found.append(
                f"{name} is a {type(module).__name__}, and a {type(other).__name__} in the stock model"
            )
            continue
        for key, value in vars(module).items():
            theirs_value = getattr(other, key, value)
            # What is for training only is of no matter to a trained model.
            if key[0] == "_" or "drop" in key or key in _FOR_TRAINING or not isinstance(value, _NUMBERS):
                continue
            if theirs_value != value:
                found.append(
                    f"{name}.{key} is {value}, and {theirs_value} in the {cls.__name__} that its config builds"
                )
    return found


def _is_dropout(module: nn.Module, other: nn.Module) -> bool:
    """Both let pass what they get in a trained model: also where somebody has put an Identity for a Dropout."""
    return all(isinstance(m, nn.Identity) or "drop" in type(m).__name__.lower() for m in (module, other))


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """The class that the module had before this package, or a parametrization, swapped it."""
    if is_parametrized(module):  # each instance has a class of its own
        return type(module).__bases__[0]
    cls: type[nn.Module] = getattr(type(module), "_ds_compress_base_class", type(module))
    return cls


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
