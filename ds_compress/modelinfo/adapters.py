"""Adapters (LoRA and its kin, from PEFT) inside a model: which modules belong to one, and to which layer.

PEFT replaces a layer `q_proj` by one that keeps it as `q_proj.base_layer` beside `q_proj.lora_A.default` and others. A
regex for `q_proj` means the layer that it always meant, so it does not reach the adapter; `lora_A` does.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_BASE = "base_layer"


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of each layer that PEFT put in the place of one of the model's own."""
    for name, module in model.named_modules():
        if hasattr(module, "adapter_layer_names") and isinstance(getattr(module, _BASE, None), nn.Module):
            yield name, module


def hosts(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """For each module of an adapter: the names of the layer that it adapts, as it was and as it is now."""
    found: dict[nn.Module, tuple[str, str]] = {}
    for name, layer in adapted_layers(model):
        base = set(layer.get_submodule(_BASE).modules())
        for module in layer.modules():
            if module is not layer and module not in base:
                found[module] = (name, f"{name}.{_BASE}")
    return found


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of the model is adapted."""
    return next(adapted_layers(model), None) is not None
