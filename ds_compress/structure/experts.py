"""Experts: the units of a mixture, each with its slices of the fused matrices, or its module of a list, and its row
of everything that routes tokens (router, router bias, correction bias).

All is found from shapes: what lies beside the experts of a block and has an entry for each of them is the routing's.
Shared experts, which every token sees, are no units.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from ds_compress.modelinfo.experts import MoeBlock, experts_per_token, moe_blocks, number_of_routing
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.inventory import Inventory, exclude_tied, rows, unique
from ds_compress.structure.prunable_group import CoupledSlice, GroupKind, PrunableGroup, Unsupported

_COUNTS = re.compile(r"(moe_)?(n|num)_(local_|routed_)?experts")
_ROUTER_GROUPS = ("n_group", "num_group", "num_expert_group", "n_groups")
_CHOSEN_GROUPS = ("topk_group", "top_k_group")


def counts_experts(attribute: str) -> bool:
    """Whether a number of that name, in a config or on a module, says how many experts there are."""
    return _COUNTS.fullmatch(attribute) is not None


def group_name(block: MoeBlock) -> str:
    """The name of a block's prunable group: its feed-forward groups may have the block's own name."""
    return f"{block.name}:experts"


def expert_groups(inventory: Inventory) -> tuple[list[PrunableGroup], list[Unsupported]]:
    """One group per mixture of experts, in model order, and mixtures whose experts cannot be removed."""
    groups: list[PrunableGroup] = []
    unsupported: list[Unsupported] = []
    for block in moe_blocks(inventory.model):
        found = _group(inventory, block)
        if isinstance(found, Unsupported):
            unsupported.append(found)
        else:
            groups.append(found)
    return exclude_tied(inventory, groups, unsupported)


def routing_slices(block: MoeBlock) -> dict[str, int]:
    """{tensor, by its name in the block: the dimension with an entry for each expert}, of all but the experts."""
    inside = f"{block.experts_name.removeprefix(block.name + '.')}."
    routers = {_top(router.removeprefix(block.name + ".")) for router in block.full_routers}
    # In a model as wide as it has experts, gates of shared ones and norms have as many entries.
    others = {f"{router.removeprefix(block.name + '.')}.weight" for router in block.routers} - {
        f"{router.removeprefix(block.name + '.')}.weight" for router in block.full_routers
    }
    slices = {}
    for name, tensor in (*block.module.named_parameters(), *block.module.named_buffers()):
        shape = _shape(tensor)
        if name.startswith(inside) or name in others or block.experts not in shape:
            continue
        if "norm" in type(block.module.get_submodule(name.rpartition(".")[0])).__name__.lower():
            continue
        if "." in name and _top(name) not in routers and not _is_for_routing(block, _top(name)):
            continue
        if shape[0] == block.experts and len(shape) <= 2:
            slices[name] = 0
        elif torch.Size(shape).numel() == block.experts:
            slices[name] = shape.index(block.experts)
    return slices


def _group(inventory: Inventory, block: MoeBlock) -> PrunableGroup | Unsupported:
    units = block.experts
    layers: tuple[str, ...] = ()
    slices: list[CoupledSlice] = []
    if block.fused is not None:
        experts = inventory.modules[block.experts_name]
        for name, tensor in (*experts.named_parameters(), *experts.named_buffers()):
            if _shape(tensor)[:1] == (units,):
                full = f"{block.experts_name}.{name}"
                slices.append(CoupledSlice(full, 0, rows(units), scored=True))
    else:
        layers = tuple(f"{block.experts_name}.{unit}" for unit in range(units))
    for name, dim in routing_slices(block).items():
        tensor = _tensor(block.module, name)
        trains = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        slices.append(CoupledSlice(inventory.child(block.name, name), dim, rows(units), masked=trains))
    parts, per_part = _router_groups(block)
    if units % parts:
        return Unsupported(
            block.name, f"its router has {parts} groups, and {units} experts are no multiple of that"
        )
    return PrunableGroup(
        name=group_name(block),
        kind=GroupKind.EXPERT,
        modules=unique([block.name, block.experts_name, *block.full_routers, *_owners(block)]),
        units=units,
        slices=tuple(slices),
        layers=layers,
        parts=parts,
        fewest=parts * per_part,
    )


def _router_groups(block: MoeBlock) -> tuple[int, int]:
    """(groups among which the router chooses first, experts that each of them needs at least)."""
    chosen = experts_per_token(block) or 1
    groups = number_of_routing(block, _ROUTER_GROUPS) or 1
    if groups == 1:
        return 1, chosen
    share = -(-chosen // (number_of_routing(block, _CHOSEN_GROUPS) or groups))
    # Routers with a correction bias score a group by the sum of its two best experts (DeepSeek-V3).
    slices = (_shape(_tensor(block.module, name)) for name in routing_slices(block))
    corrected = any(torch.Size(shape).numel() == block.experts for shape in slices)
    return groups, max(share, 2 if corrected else 1)


def _is_for_routing(block: MoeBlock, child: str) -> bool:
    """Whether all that a child has are vectors with an entry for each expert."""
    module = block.module.get_submodule(child)
    return all(
        torch.Size(_shape(t)).numel() == block.experts for t in (*module.parameters(), *module.buffers())
    )


def _owners(block: MoeBlock) -> list[str]:
    owners = (name.rpartition(".")[0] for name in routing_slices(block))
    return [".".join(part for part in (block.name, owner) if part) for owner in owners]


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    owner, _, own = name.rpartition(".")
    found = getattr(module.get_submodule(owner), own)
    assert isinstance(found, torch.Tensor)
    return found


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return shape_of(tensor) if isinstance(tensor, nn.Parameter) else tuple(tensor.shape)


def _top(name: str) -> str:
    return name.partition(".")[0]
