"""What the config of a pruned model cannot express: attributes of modules, such as heads per layer, and shapes."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.kinds import shape_of

_NUMBERS = (int, float)
_RESTORED_WITH_WEIGHTS = ("in_features", "out_features", "num_embeddings", "embedding_dim", "nf", "nx")


def built_from_config(cls: type[nn.Module], config: Any) -> nn.Module:
    """`cls(config)` without weights, from the config as it comes back from `config.json`."""
    loaded = type(config).from_dict(json.loads(json.dumps(config.to_dict(), default=str)))
    with torch.device("meta"):
        return cls(loaded).eval()


def attribute_overrides(final: nn.Module, config: Any) -> dict[str, dict[str, float]]:
    """{module: {attribute: value}} of `final` where a model built from its config has another number."""
    built = dict(built_from_config(type(final), config).named_modules())
    differences: dict[str, dict[str, float]] = {}
    for name, module in final.named_modules():
        other = built.get(name)
        if other is None or "drop" in type(module).__name__.lower():
            continue  # dropout does not affect a trained model
        for key, value in vars(module).items():
            theirs = getattr(other, key, value)
            is_number = type(value) in _NUMBERS and type(theirs) in _NUMBERS
            if key in _RESTORED_WITH_WEIGHTS or key[0] == "_" or "drop" in key:
                continue
            if is_number and value != theirs:
                differences.setdefault(name, {})[key] = value
    return differences


def shape_overrides(final: nn.Module, config: Any) -> dict[str, list[int]]:
    """{parameter: its shape in `final`} where a model built from its config has another one."""
    built = dict(built_from_config(type(final), config).named_parameters(remove_duplicate=False))
    return {
        name: list(shape_of(parameter))
        for name, parameter in final.named_parameters(remove_duplicate=False)
        if name in built and built[name].shape != shape_of(parameter)
    }


def restore(model: nn.Module, differences: dict[str, dict[str, float]]) -> None:
    """Sets the attributes that `attribute_overrides` found."""
    for name, values in differences.items():
        module = model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)
