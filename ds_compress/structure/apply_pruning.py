"""Removing units from a model: smaller tensors, fewer layers, and the attributes and configs that give their sizes."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from ds_compress.modelinfo.experts import moe_blocks, remember_removed
from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.attention import HEADS, Attention, attention_projections, attentions_of
from ds_compress.structure.experts import counts_experts, expert_groups
from ds_compress.structure.feed_forward import row_groups
from ds_compress.structure.heads import head_groups
from ds_compress.structure.hidden import scales_epsilon
from ds_compress.structure.inventory import Inventory, second_names
from ds_compress.structure.model_config import (
    configs_of,
    configs_of_stack,
    private_config,
    set_depth,
    update_config,
)
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup
from ds_compress.structure.pruning_plan import PruningPlan

_KEY_VALUE_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "kv_heads",
    "num_key_value_heads_per_layer",
)
_GROUPS = ("num_key_value_groups", "n_rep", "num_queries_per_kv", "kv_groups")
_WIDTHS = ("all_head_size", "split_size", "inner_dim")
_WIDTHS_OR_INPUTS = ("embed_dim", "hidden_size", "dim", "d_model", "attn_dim")
"""Attributes of attention modules that say heads * head_dim; the second ones may as well say what goes in, and are
changed only where the forward reads them."""
_INNER_SIZES = (
    "intermediate_size",
    "hidden_dim",
    "ffn_dim",
    "d_ff",
    "inner_dim",
    "ffn_hidden_size",
    "ffn_size",
)
_EXPERT_SIZES = ("intermediate_dim", "intermediate_size", "moe_intermediate_size", "expert_dim", "ffn_dim")
"""Of fused experts and of the blocks around them; `hidden_dim` of those is the width of the residual stream."""
_HIDDEN_SIZES = ("hidden_size", "embed_dim", "d_model", "dim")
_HIDDEN_SIZES_OF_MIXTURES = ("hidden_dim", "input_size")
"""In experts, routers and the blocks around them; elsewhere the first is the width of what is inside."""
_DEPTHS = ("n_layers", "num_layers", "num_hidden_layers", "n_layer")


@torch.no_grad()
def apply_pruning(model: nn.Module, pruning_plan: PruningPlan, meta: bool = False) -> None:
    """See `PruningPlan.apply_pruning`."""
    inventory = Inventory(model)
    pruning_plan.aliases |= second_names(model)
    pruning_plan.know_scales(model)
    # Everything is looked up before anything changes.
    attentions, _ = attentions_of(inventory)
    counted = _with_unpruned(inventory, pruning_plan)
    configs = configs_of(model)
    _check(model, pruning_plan)
    _replace_tensors(model, pruning_plan, meta)
    for module in model.modules():
        _fix_sizes(module)
    uniform = _uniform_heads(counted)
    for attention in attentions:
        _fix_attention(inventory, attention, uniform)
    _fix_remarks(model, pruning_plan)
    _scale_epsilon(model, pruning_plan)
    for config, prefixes in configs:
        below = [(s, n) for s, n in counted if any(_is_below(s, prefix) for prefix in prefixes)]
        update_config(config, below)
    experts = {group.layers[0].rpartition(".")[0] for group in _expert_lists(pruning_plan)}
    for stack, deleted in pruning_plan.deleted_layers().items():
        if stack in experts:
            continue
        depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
        kept = [index for index in range(depth) if index not in deleted]
        for config in configs_of_stack(model, stack, depth):
            set_depth(config, stack, depth, kept)
    _delete_layers(model, pruning_plan)


def _expert_lists(pruning_plan: PruningPlan) -> list[PrunableGroup]:
    return [group for group in pruning_plan.active() if group.kind is GroupKind.EXPERT and group.layers]


def _with_unpruned(inventory: Inventory, pruning_plan: PruningPlan) -> list[tuple[PrunableGroup, int]]:
    """(group, units in the end) of the groups of the plan, and of all others of the kinds that it prunes."""
    counted = [(group, pruning_plan.count(group)) for group in pruning_plan.groups]
    named = {coupled.tensor for group in pruning_plan.groups for coupled in group.slices}
    for kind in (GroupKind.ROW, GroupKind.HEAD, GroupKind.EXPERT):
        if any(group.kind is kind for group in pruning_plan.active()):
            if kind is GroupKind.ROW:
                others, _ = row_groups(inventory, attention_projections(inventory))
            else:
                others, _ = head_groups(inventory) if kind is GroupKind.HEAD else expert_groups(inventory)
            for other in others:
                if not any(coupled.tensor in named for coupled in other.slices):
                    counted.append((other, other.units))
    return counted


def _check(model: nn.Module, pruning_plan: PruningPlan) -> None:
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for group in pruning_plan.active():
        for coupled in group.slices:
            tensor = tensors.get(coupled.tensor)
            if tensor is None:
                raise ValueError(f"{group.name}: this model has no tensor {coupled.tensor}")
            shape = shape_of(tensor) if isinstance(tensor, nn.Parameter) else tuple(tensor.shape)
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{coupled.tensor} is sharded: gather it, or stream it by `PruningPlan.prune_tensor`"
                )
            entries = shape[coupled.dim] * (shape[0] if coupled.of_experts else 1)
            is_whole = not coupled.of_experts or shape[0] == group.parts
            if not is_whole or (coupled.index.numel() and int(coupled.index.max()) >= entries):
                raise ValueError(
                    f"{coupled.tensor} has the shape {list(shape)}: it was pruned before, or belongs to another model"
                )


def _replace_tensors(model: nn.Module, pruning_plan: PruningPlan, meta: bool) -> None:
    """Replaces each old tensor by one new one wherever it is used, so that ties stay ties."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    new: dict[int, torch.Tensor] = {}
    old: list[torch.Tensor] = []  # kept until all is done, so that no new tensor has the id of an old one
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None or not pruning_plan.touches(names.get(id(tensor), "")):
                    continue
                if id(tensor) not in new:
                    old.append(tensor)
                    new[id(tensor)] = _smaller(tensor, names[id(tensor)], pruning_plan, meta)
                own[key] = new[id(tensor)]  # type: ignore[assignment]


def _smaller(tensor: torch.Tensor, name: str, pruning_plan: PruningPlan, meta: bool) -> torch.Tensor:
    full = tensor.detach()
    if full.is_meta and not meta:
        raise ValueError(f"{name} is on the meta device: pass meta=True where only shapes are wanted")
    values = pruning_plan.prune_tensor(name, full).contiguous()
    if not isinstance(tensor, nn.Parameter):
        return values
    return nn.Parameter(values, requires_grad=tensor.requires_grad)


def _fix_sizes(module: nn.Module) -> None:
    """Attributes of torch's own layers (and GPT-2's Conv1D) from the shapes of their tensors."""
    weight: torch.Tensor | None = module._parameters.get("weight")
    if weight is None:  # a normalization without affine parameters has statistics
        weight = module._buffers.get("running_mean")
    if weight is None:
        return
    shape = tuple(weight.shape)
    changes: dict[str, Any] = {}
    if isinstance(module, nn.Linear):
        changes = {"out_features": shape[0], "in_features": shape[1]}
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)) and not module.transposed:
        groups = module.groups
        if groups == module.in_channels == module.out_channels:
            groups = shape[0]
        changes = {"out_channels": shape[0], "in_channels": shape[1] * groups, "groups": groups}
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        changes = {"num_features": shape[0]}
    elif isinstance(module, nn.PReLU):
        changes = {"num_parameters": shape[0]}
    elif isinstance(module, nn.GroupNorm):
        changes = {"num_channels": shape[0]}
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        changes = {"normalized_shape": shape}
    elif isinstance(module, nn.Embedding):
        changes = {"num_embeddings": shape[0], "embedding_dim": shape[1]}
    elif hasattr(module, "nx") and hasattr(module, "nf"):
        changes = {"nx": shape[0], "nf": shape[1]}
    for attribute, value in changes.items():
        if getattr(module, attribute) != value:
            setattr(module, attribute, value)


def _fix_attention(inventory: Inventory, attention: Attention, uniform: bool) -> None:
    output = inventory.modules[attention.output.name].get_parameter("weight")
    dim = 1 if isinstance(inventory.modules[attention.output.name], nn.Linear) else 0
    columns = output.shape[dim]
    if columns == attention.output.inputs:
        return
    heads, key_values = attention.counts(columns)
    holder = inventory.modules[attention.holder]
    _set(holder, HEADS, attention.heads, heads)
    _set(holder, _KEY_VALUE_HEADS, attention.key_value_heads, key_values)
    _set(holder, _GROUPS, attention.heads // attention.key_value_heads, heads // key_values)
    width = attention.heads * attention.head_dim
    read = tuple(attribute for attribute in _WIDTHS_OR_INPUTS if _is_read(holder, attribute))
    _set(holder, _WIDTHS + read, width, heads * attention.head_dim)
    if not uniform and _is_read(holder, "config.num_attention_heads"):
        # Phi3 splits q, k and v by the config that all its layers share.
        private_config(holder, heads, key_values)


def _fix_remarks(model: nn.Module, pruning_plan: PruningPlan) -> None:
    """Attributes by which modules remember the sizes that they were built with."""
    for group in pruning_plan.active():
        attributes: tuple[str, ...]
        if group.kind is GroupKind.HIDDEN:
            holders, attributes = list(model.modules()), _HIDDEN_SIZES
        elif group.kind is GroupKind.ROW and group.parts > 1:
            around = group.name.rpartition(".")[0]
            holders, attributes = [model.get_submodule(name) for name in (group.name, around)], _EXPERT_SIZES
        elif group.kind is GroupKind.ROW:
            parents = {name.rpartition(".")[0] for name in group.modules}
            holders, attributes = [model.get_submodule(name) for name in parents], _INNER_SIZES
        elif group.kind is GroupKind.LAYER:
            stack = group.layers[0].rpartition(".")[0]
            depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
            left = depth - group.units + pruning_plan.count(group)
            _set(model.get_submodule(stack.rpartition(".")[0]), _DEPTHS, depth, left)
            continue
        elif group.kind is GroupKind.EXPERT:
            _fix_expert_counts(model, group, pruning_plan.count(group))
            for name in group.modules[2:]:
                remember_removed(model.get_submodule(name), pruning_plan.kept[group.name])
            continue
        else:
            continue
        if group.kind is GroupKind.HIDDEN:
            for block in moe_blocks(model):
                for module in block.module.modules():
                    _set(module, _HIDDEN_SIZES_OF_MIXTURES, group.units, pruning_plan.count(group))
        for holder in holders:
            _set(holder, attributes, group.width, pruning_plan.count(group) // group.parts)


def _fix_expert_counts(model: nn.Module, group: PrunableGroup, count: int) -> None:
    """In the block, and in the modules around it (for a loss that balances the load)."""
    block = group.modules[0]
    for name, module in model.named_modules():
        if f"{name}.".startswith(f"{block}.") or not name or f"{block}.".startswith(f"{name}."):
            _set(module, tuple(filter(counts_experts, vars(module))), group.units, count)


def _scale_epsilon(model: nn.Module, pruning_plan: PruningPlan) -> None:
    """Norms over k of n entries: their epsilon weighs as much as before beside a mean that is n / k times as large."""
    for group in pruning_plan.active():
        if group.kind is GroupKind.HIDDEN and scales_epsilon(getattr(model, "config", None)):
            for coupled in group.slices:
                norm = model.get_submodule(coupled.tensor.rpartition(".")[0])
                for attribute in ("variance_epsilon", "eps") if coupled.rescale else ():
                    if isinstance(getattr(norm, attribute, None), float):
                        setattr(
                            norm,
                            attribute,
                            getattr(norm, attribute) * (group.units / pruning_plan.count(group)),
                        )


def _set(module: nn.Module, attributes: tuple[str, ...], old: int, new: int) -> None:
    for attribute in attributes:
        if type(vars(module).get(attribute)) is int and vars(module)[attribute] == old:
            setattr(module, attribute, new)


def _is_read(module: nn.Module, attribute: str) -> bool:
    """Whether a method other than the constructor reads `self.attribute`."""
    pattern = re.compile(rf"self\.{re.escape(attribute)}\b")
    for cls in type(module).__mro__:
        if cls is nn.Module:
            return False
        for name, method in vars(cls).items():
            if name != "__init__" and inspect.isfunction(method):
                try:
                    source = inspect.getsource(inspect.unwrap(method))
                except (OSError, TypeError):
                    return True
                if pattern.search(source):
                    return True
    return False


def _uniform_heads(counted: list[tuple[PrunableGroup, int]]) -> bool:
    return len({(s.units, n) for s, n in counted if s.kind is GroupKind.HEAD}) <= 1


def _is_below(group: PrunableGroup, prefix: str) -> bool:
    names = group.layers or group.modules
    return not prefix or any(name.startswith(prefix + ".") for name in names)


def _delete_layers(model: nn.Module, pruning_plan: PruningPlan) -> None:
    experts = {group.layers[0].rpartition(".")[0] for group in _expert_lists(pruning_plan)}
    # Innermost first, while the names of what is around it still hold.
    for stack, indices in sorted(pruning_plan.deleted_layers().items(), key=lambda item: -item[0].count(".")):
        layers = model.get_submodule(stack)
        assert isinstance(layers, nn.ModuleList)
        for index in reversed(indices):
            # From the list itself, which whoever holds a reference to it must see.
            del layers[index]
        for index, layer in enumerate(() if stack in experts else layers):
            for module in layer.modules():
                # Attention modules know their place, for the key-value cache.
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index  # type: ignore[assignment]
