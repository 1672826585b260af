"""Configs of transformers models: which keys hold the sizes that pruning changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ds_compress.structure.experts import counts_experts
from ds_compress.structure.hidden import scales_epsilon
from ds_compress.structure.mixture_config import (
    is_list_of_numbers,
    is_shared_in_multiples,
    set_mixture_depth,
    set_shared_multiple,
    width_keys,
)
from ds_compress.structure.prunable_group import GroupKind, PrunableGroup

Counted = Sequence[tuple[PrunableGroup, int]]
_ROWS = ("intermediate_size", "d_ff", "hidden_dim", "ffn_dim", "ffn_hidden_size", "n_inner")
_PER_LAYER = ("attention_window",)
_HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")


def configs_of(model: nn.Module) -> list[tuple[Any, list[str]]]:
    """Every config object in the model, once, with the names of the modules that hold it."""
    configs: dict[int, tuple[Any, list[str]]] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "__dict__"):
            configs.setdefault(id(config), (config, []))[1].append(name)
    return list(configs.values())


def configs_of_stack(model: nn.Module, stack: str, depth: int) -> list[Any]:
    """The config objects that hold the number of layers of the ModuleList `stack`, which is `depth`.

    That of the innermost module around it that has the number, and its copies: in modules further out, in the layers
    themselves, and as a part of a composite config. A model of several towers (CLIP, Gemma-3 with vision) has a config
    for each, and towers of the same depth must not be confused.
    """
    around = [
        name for name in dict(model.named_modules()) if name == "" or f"{stack}.".startswith(f"{name}.")
    ]
    held = [
        config for name in reversed(around) if (config := _config_of(model.get_submodule(name))) is not None
    ]
    described = next((config for config in held if _describes(config, stack, depth)), None)
    if described is None:
        return []
    layers = [_config_of(module) for module in model.get_submodule(stack).modules()]
    parts = [part for config in held for part in _parts(config, stack) if part is not None]
    found = [
        config
        for config in (described, *held, *layers, *parts)
        if config is not None and type(config) is type(described) and _describes(config, stack, depth)
    ]
    return list({id(config): config for config in found}.values())


def set_depth(config: Any, stack: str, depth: int, kept: Sequence[int]) -> None:
    """Writes into a config of `configs_of_stack` that of the `depth` layers of `stack` only `kept` are left."""
    keys = _depth_keys(config, stack)
    lists = {
        key: value
        for key, value in vars(config).items()
        # `layer_types` and similar keys have an item for each layer.
        if isinstance(value, list)
        and not is_list_of_numbers(key)
        and ("layer" in key or key in _PER_LAYER)
        and len(value) == depth == getattr(config, keys[-1], None)
    }
    for key in keys:
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, len(kept))
            if key in ("encoder_layers", "num_layers"):
                break
    for key, value in lists.items():
        setattr(config, key, [value[index] for index in kept])
    set_mixture_depth(config, depth, kept)
    _update_stage_names(config)


def update_config(config: Any, counted: Counted) -> None:
    """Writes the sizes of the groups that this config describes; those in which layers differ stay.

    counted: (group, units in the end) of all groups below the modules that hold the config; layers are ignored, see
    `set_depth`.
    """
    rows = [(s, n) for s, n in counted if s.kind is GroupKind.ROW]
    heads = [(s, n) for s, n in counted if s.kind is GroupKind.HEAD]
    _experts(config, [(s, n) for s, n in counted if s.kind is GroupKind.EXPERT])
    for stack, own in _by_stack(config, rows, "{}_ffn_dim").items():
        _rows(config, own, stack)
    for stack, own in _by_stack(config, heads, "{}_attention_heads").items():
        _heads(config, own, stack)
    for group, count in counted:
        if group.kind is GroupKind.HIDDEN and count < group.units:
            _hidden(config, group.units, count)


def private_config(holder: nn.Module, heads: int, key_value_heads: int) -> None:
    """Gives one attention module a config of its own with its own numbers of heads."""
    config: Any = copy.copy(holder.config)
    config.num_attention_heads = heads
    config.num_key_value_heads = key_value_heads
    holder.config = config


def _by_stack(config: Any, counted: Counted, key: str) -> dict[str, Counted]:
    """Encoder and decoder apart where the config has a key for each."""
    stacks: dict[str, list[tuple[PrunableGroup, int]]] = {}
    for group, count in counted:
        stack = _stack(config, group)
        stacks.setdefault(stack if hasattr(config, key.format(stack)) else "", []).append((group, count))
    return dict(stacks)


def _stack(config: Any, group: PrunableGroup) -> str:
    """Which stack of an encoder-decoder the group is in; "" in other models."""
    return _side(config, (group.layers or group.modules)[0])


def _side(config: Any, module: str) -> str:
    if not getattr(config, "is_encoder_decoder", False) and not hasattr(config, "num_decoder_layers"):
        return ""
    return next((part for part in module.split(".") if part in ("encoder", "decoder")), "")


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "__dict__") else None


def _describes(config: Any, stack: str, depth: int) -> bool:
    return any(getattr(config, key, None) == depth for key in _depth_keys(config, stack))


def _parts(config: Any, stack: str) -> Iterator[Any]:
    """The configs inside a composite one that are of this tower: `vision_config` of `vision_model.encoder.layers`."""
    for key, value in vars(config).items():
        name = key.removesuffix("_config")
        if key.endswith("_config") and hasattr(value, "__dict__"):
            tower = {"text": ("text", "language")}.get(name, (name,))
            if any(word in stack for word in tower):
                yield value


def _depth_keys(config: Any, stack: str) -> tuple[str, ...]:
    side = _side(config, stack)
    if side == "decoder":
        keys: tuple[str, ...] = ("decoder_layers", "num_decoder_layers")
        return (*keys, "num_layers") if getattr(config, "is_decoder", False) else keys
    if side == "encoder":
        return ("encoder_layers", "num_layers", "num_hidden_layers")
    return ("num_hidden_layers",)


def _rows(config: Any, counted: Counted, stack: str) -> None:
    multiples = [(group, count) for group, count in counted if is_shared_in_multiples(config, group)]
    by_key: dict[str, list[tuple[PrunableGroup, int]]] = {}
    for group, count in counted:
        key = None if (group, count) in multiples else _row_key(config, group, stack)
        if key is not None:
            by_key.setdefault(key, []).append((group, count))
    for key, own in by_key.items():
        sizes = _agreed(own)
        if sizes is not None:
            setattr(config, key, sizes[1])
    shared = _agreed(multiples, of_change=False)
    if shared is not None:
        set_shared_multiple(config, shared[1])


def _row_key(config: Any, group: PrunableGroup, stack: str) -> str | None:
    """The key that holds the width of this feed-forward block."""
    for key in (*width_keys(group), f"{stack}_ffn_dim", *_ROWS):
        value = getattr(config, key, None)
        # GPT-2's n_inner, GPT-Neo's intermediate_size: None for four times the width.
        if value == group.width or (value is None and hasattr(config, key)):
            return key
    return None


def _heads(config: Any, counted: Counted, stack: str) -> None:
    sizes = _agreed(counted)
    if sizes is None:
        return
    units, kept = sizes
    key = next(
        (k for k in (f"{stack}_attention_heads", *_HEADS) if isinstance(getattr(config, k, None), int)), None
    )
    if key is None:
        return
    heads = getattr(config, key)
    key_values = getattr(config, "num_key_value_heads", None)
    if not hasattr(config, "d_kv"):
        # Else the size of a head would be deduced from their number.
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    setattr(config, key, heads * kept // units)
    if isinstance(key_values, int) and key_values > 1:
        config.num_key_value_heads = key_values * kept // units


def _experts(config: Any, counted: Counted) -> None:
    sizes = _agreed(counted, of_parts=False)
    if sizes is None:
        return
    before, after = sizes
    for key, value in list(vars(config).items()):
        if counts_experts(key) and value == before and type(value) is int:
            setattr(config, key, after)
        elif counts_experts(key) and isinstance(value, list):  # an item for each layer
            setattr(config, key, [after if count == before else count for count in value])


def _hidden(config: Any, units: int, kept: int) -> None:
    if getattr(config, "hidden_size", None) != units:
        return
    config.head_dim = getattr(config, "head_dim", None) or units // config.num_attention_heads
    config.hidden_size = kept
    if scales_epsilon(config):
        config.rms_norm_eps *= units / kept


def _update_stage_names(config: Any) -> None:
    """Updates the names of the layer outputs of vision backbones, the last of which is returned."""
    stages, indices = getattr(config, "stage_names", None), getattr(config, "_out_indices", None)
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(stages, list) and isinstance(depth, int) and len(stages) > depth + 1:
        if indices == [len(stages) - 1]:
            config._out_indices, config._out_features = [depth], [stages[depth]]
        config.stage_names = stages[: depth + 1]


def _agreed(
    counted: Iterable[tuple[PrunableGroup, int]], of_change: bool = True, of_parts: bool = True
) -> tuple[int, int] | None:
    """(units before, units after), `of_parts`: of each part, when that is the same for all and a change."""
    sizes = {(g.width, count // g.parts) if of_parts else (g.units, count) for g, count in counted}
    if len(sizes) != 1:
        return None
    before, after = sizes.pop()
    return None if before == after and of_change else (before, after)
