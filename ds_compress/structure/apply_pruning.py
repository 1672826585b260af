"""Rewriting a model: smaller tensors, fewer layers, and every attribute and config that says how many there are."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_compress.modelinfo.kinds import shape_of
from ds_compress.structure.attention import HEADS, Attention, attentions_of
from ds_compress.structure.find import find_structures
from ds_compress.structure.hidden import scales_epsilon
from ds_compress.structure.inventory import Inventory, second_names
from ds_compress.structure.model_config import (
    configs_of,
    configs_of_stack,
    private_config,
    rewrite_config,
    set_depth,
)
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup

if TYPE_CHECKING:
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
_HIDDEN_SIZES = ("hidden_size", "embed_dim", "d_model", "dim")
_DEPTHS = ("n_layers", "num_layers", "num_hidden_layers", "n_layer")


@torch.no_grad()
def rewrite(model: nn.Module, cuts: PruningPlan, skeleton: bool = False) -> None:
    """See `PruningPlan.rewrite`."""
    inventory = Inventory(model)
    cuts.aliases |= second_names(model)
    # What the model looks like is read before anything changes.
    attentions, _ = attentions_of(inventory)
    counted = _with_uncut(model, cuts)
    configs = configs_of(model)
    _check(model, cuts)
    _replace_tensors(model, cuts, skeleton)
    for module in model.modules():
        _fix_sizes(module)
    uniform = _uniform_heads(counted)
    for attention in attentions:
        _fix_attention(inventory, attention, uniform)
    _fix_remarks(model, cuts)
    _scale_epsilon(model, cuts)
    for config, prefixes in configs:
        below = [(s, n) for s, n in counted if any(_is_below(s, prefix) for prefix in prefixes)]
        rewrite_config(config, below)
    for stack, deleted in cuts.deleted_layers().items():
        depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
        kept = [index for index in range(depth) if index not in deleted]
        for config in configs_of_stack(model, stack, depth):
            set_depth(config, stack, depth, kept)
    _delete_layers(model, cuts)


def _with_uncut(model: nn.Module, cuts: PruningPlan) -> list[tuple[PrunableGroup, int]]:
    """(structure, units in the end) of the cut ones, and of all others of the kinds that are cut."""
    counted = [(structure, cuts.count(structure)) for structure in cuts.structures]
    named = {member.tensor for structure in cuts.structures for member in structure.members}
    for kind in (GroupKind.ROW, GroupKind.HEAD):
        if any(structure.kind is kind for structure in cuts.active()):
            for other in find_structures(model, kind).structures:
                if not any(member.tensor in named for member in other.members):
                    counted.append((other, other.units))
    return counted


def _check(model: nn.Module, cuts: PruningPlan) -> None:
    tensors: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for structure in cuts.active():
        for member in structure.members:
            tensor = tensors.get(member.tensor)
            if tensor is None:
                raise ValueError(f"{structure.name}: this model has no tensor {member.tensor}")
            shape = shape_of(tensor) if isinstance(tensor, nn.Parameter) else tuple(tensor.shape)
            if shape != tuple(tensor.shape):
                raise ValueError(
                    f"{member.tensor} is not whole in this process: gather it, or stream it by `apply`"
                )
            if member.index.numel() and int(member.index.max()) >= shape[member.dim]:
                raise ValueError(
                    f"{member.tensor} has the shape {list(shape)}: it was cut before, or is another model's"
                )


def _replace_tensors(model: nn.Module, cuts: PruningPlan, skeleton: bool) -> None:
    """Puts one new tensor per old one in every place that used it, so that ties stay ties."""
    names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
    new: dict[int, torch.Tensor] = {}
    old: list[torch.Tensor] = []  # kept until all is done, so that no new tensor has the id of an old one
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for key, tensor in own.items():
                if tensor is None or not cuts.touches(names.get(id(tensor), "")):
                    continue
                if id(tensor) not in new:
                    old.append(tensor)
                    new[id(tensor)] = _smaller(tensor, names[id(tensor)], cuts, skeleton)
                own[key] = new[id(tensor)]  # type: ignore[assignment]


def _smaller(tensor: torch.Tensor, name: str, cuts: PruningPlan, skeleton: bool) -> torch.Tensor:
    whole = tensor.detach()
    if whole.is_meta and not skeleton:
        raise ValueError(
            f"{name} is on the meta device: say skeleton=True if its shape is all that is wanted"
        )
    values = cuts.apply(name, whole).contiguous()
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


def _fix_remarks(model: nn.Module, cuts: PruningPlan) -> None:
    """Attributes by which modules remember the sizes that they were built with."""
    for structure in cuts.active():
        attributes: tuple[str, ...]
        if structure.kind is GroupKind.HIDDEN:
            shard_group, attributes = list(model.modules()), _HIDDEN_SIZES
        elif structure.kind is GroupKind.ROW:
            parents = {name.rpartition(".")[0] for name in structure.modules}
            shard_group, attributes = [model.get_submodule(name) for name in parents], _INNER_SIZES
        elif structure.kind is GroupKind.LAYER:
            stack = structure.layers[0].rpartition(".")[0]
            depth = len(model.get_submodule(stack))  # type: ignore[arg-type]
            left = depth - structure.units + cuts.count(structure)
            _set(model.get_submodule(stack.rpartition(".")[0]), _DEPTHS, depth, left)
            continue
        else:
            continue
        for holder in shard_group:
            _set(holder, attributes, structure.units, cuts.count(structure))


def _scale_epsilon(model: nn.Module, cuts: PruningPlan) -> None:
    """Norms over k of n entries: their epsilon weighs as much as before beside a mean that is n / k times as large."""
    for structure in cuts.active():
        if structure.kind is GroupKind.HIDDEN and scales_epsilon(getattr(model, "config", None)):
            for member in structure.members:
                norm = model.get_submodule(member.tensor.rpartition(".")[0])
                for attribute in ("variance_epsilon", "eps") if member.rescale else ():
                    if isinstance(getattr(norm, attribute, None), float):
                        setattr(
                            norm,
                            attribute,
                            getattr(norm, attribute) * (structure.units / cuts.count(structure)),
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


def _is_below(structure: PrunableGroup, prefix: str) -> bool:
    names = structure.layers or structure.modules
    return not prefix or any(name.startswith(prefix + ".") for name in names)


def _delete_layers(model: nn.Module, cuts: PruningPlan) -> None:
    for stack, indices in cuts.deleted_layers().items():
        layers = model.get_submodule(stack)
        assert isinstance(layers, nn.ModuleList)
        for index in reversed(indices):
            # From the list itself, which whoever holds a reference to it must see.
            del layers[index]
        for index, layer in enumerate(layers):
            for module in layer.modules():
                # Attention modules know their place, for the key-value cache.
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = index  # type: ignore[assignment]
