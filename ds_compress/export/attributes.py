"""Numbers that a cut model's modules keep and that its config cannot say, such as heads per layer."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import nn

_NUMBERS = (int, float)
_RESTORED_WITH_WEIGHTS = ("in_features", "out_features", "num_embeddings", "embedding_dim", "nf", "nx")


def fresh(cls: type[nn.Module], config: Any) -> nn.Module:
    """`cls(config)` without weights, from the config as it comes back from `config.json`."""
    loaded = type(config).from_dict(json.loads(json.dumps(config.to_dict(), default=str)))
    with torch.device("meta"):
        return cls(loaded).eval()


def unsaid(final: nn.Module, config: Any) -> dict[str, dict[str, float]]:
    """{module: {attribute: value}} of `final` where a model built from its config has another number."""
    built = dict(fresh(type(final), config).named_modules())
    differences: dict[str, dict[str, float]] = {}
    for name, module in final.named_modules():
        other = built.get(name)
        if other is None:
            continue
        for key, value in vars(module).items():
            theirs = getattr(other, key, value)
            is_number = type(value) in _NUMBERS and type(theirs) in _NUMBERS
            if is_number and value != theirs and key not in _RESTORED_WITH_WEIGHTS and key[0] != "_":
                differences.setdefault(name, {})[key] = value
    return differences


def restore(model: nn.Module, differences: dict[str, dict[str, float]]) -> None:
    """Sets what `unsaid` found."""
    for name, values in differences.items():
        module = model.get_submodule(name)
        for key, value in values.items():
            setattr(module, key, value)
