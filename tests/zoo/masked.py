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
    """For each structure random units, the same number in structures of equal size; of each expert its own."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        multiples = max(1, round(group.width * fraction / group.multiple))
        count = min(group.width, group.multiple * multiples)
        of_each = [
            expert * group.width + torch.randperm(group.width, generator=generator)[:count].sort().values
            for expert in range(group.parts)
        ]
        kept[group.name] = torch.cat(of_each)
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
            if coupled.of_experts:
                _clear_of_experts(tensors[coupled.tensor], coupled.dim, coupled.index[gone].flatten())
            elif coupled.masked:
                tensors[coupled.tensor].index_fill_(coupled.dim, coupled.index[gone].flatten(), 0)
    return masked


def _hand_on(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    hidden = args[0] if args else kwargs["hidden_states"]
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden


def _clear_of_experts(tensor: torch.Tensor, dim: int, entries: torch.Tensor) -> None:
    for expert, entry in zip(*(part.tolist() for part in _divided(entries, tensor.shape[dim])), strict=True):
        tensor[expert].select(dim - 1, entry).zero_()


def _divided(entries: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return entries // size, entries % size
