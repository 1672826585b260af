"""The masked model that a cut must equal, made without any of the library's training code."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ds_compress.structure.prunable_group import GroupKind, PrunableGroup


def kept_units(
    groups: Iterable[PrunableGroup], fraction: float = 0.5, seed: int = 0
) -> dict[str, torch.Tensor]:
    """For each structure random units, the same number in structures of equal size."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        count = max(1, round(group.units * fraction))
        kept[group.name] = torch.randperm(group.units, generator=generator)[:count].sort().values
    return kept


@torch.no_grad()
def masked_copy(
    model: nn.Module, groups: Iterable[PrunableGroup], kept: Mapping[str, torch.Tensor]
) -> nn.Module:
    """A copy in which the entries of all other units are zero, and all other layers hand their input on."""
    masked = copy.deepcopy(model)
    tensors = {**dict(masked.named_parameters()), **dict(masked.named_buffers())}
    for group in groups:
        gone = torch.ones(group.units, dtype=torch.bool)
        gone[kept[group.name]] = False
        if group.kind is GroupKind.LAYER:
            for name, is_gone in zip(group.layers, gone, strict=True):
                if is_gone:
                    masked.get_submodule(name).register_forward_hook(_hand_on, with_kwargs=True)
        for coupled in group.slices:
            if coupled.masked:
                tensors[coupled.tensor].index_fill_(coupled.dim, coupled.index[gone].flatten(), 0)
    return masked


def _hand_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden
