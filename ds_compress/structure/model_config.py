"""Configs of transformers models: which keys hold the sizes that a cut changes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ds_compress.structure.hidden import scales_epsilon
from ds_compress.structure.structure import Structure, StructureKind

if TYPE_CHECKING:
    from ds_compress.structure.cut import Cuts

Counted = Sequence[tuple[Structure, int]]
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


def rewrite_config(config: Any, counted: Counted, cuts: Cuts) -> None:
    """Writes the sizes of the structures that this config describes; those on which layers disagree stay.

    counted: (structure, units in the end) of all structures below the modules that hold the config.
    """
    rows = [(s, n) for s, n in counted if s.kind is StructureKind.ROW]
    heads = [(s, n) for s, n in counted if s.kind is StructureKind.HEAD]
    for stack, own in _by_stack(config, rows, "{}_ffn_dim").items():
        _rows(config, own, stack)
    for stack, own in _by_stack(config, heads, "{}_attention_heads").items():
        _heads(config, own, stack)
    for structure, count in counted:
        if structure.kind is StructureKind.LAYER and count < structure.units:
            _layers(config, structure, _stack(config, structure), cuts)
        if structure.kind is StructureKind.HIDDEN and count < structure.units:
            _hidden(config, structure.units, count)


def private_config(holder: nn.Module, heads: int, key_value_heads: int) -> None:
    """Gives one attention module a config of its own with its own numbers of heads."""
    config: Any = copy.copy(holder.config)
    config.num_attention_heads = heads
    config.num_key_value_heads = key_value_heads
    holder.config = config


def _by_stack(config: Any, counted: Counted, key: str) -> dict[str, Counted]:
    """Encoder and decoder apart where the config has a key for each."""
    stacks: dict[str, list[tuple[Structure, int]]] = {}
    for structure, count in counted:
        stack = _stack(config, structure)
        stacks.setdefault(stack if hasattr(config, key.format(stack)) else "", []).append((structure, count))
    return dict(stacks)


def _stack(config: Any, structure: Structure) -> str:
    """Which stack of an encoder-decoder the structure is in; "" in other models."""
    if not getattr(config, "is_encoder_decoder", False) and not hasattr(config, "num_decoder_layers"):
        return ""
    parts = (structure.layers or structure.modules)[0].split(".")
    return next((part for part in parts if part in ("encoder", "decoder")), "")


def _rows(config: Any, counted: Counted, stack: str) -> None:
    sizes = _agreed(counted)
    if sizes is None:
        return
    old, new = sizes
    for key in (f"{stack}_ffn_dim", *_ROWS):
        value = getattr(config, key, None)
        # GPT-2's n_inner, GPT-Neo's intermediate_size: None for four times the width.
        if value == old or (value is None and hasattr(config, key)):
            setattr(config, key, new)
            return


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


def _hidden(config: Any, units: int, kept: int) -> None:
    if getattr(config, "hidden_size", None) != units:
        return
    config.head_dim = getattr(config, "head_dim", None) or units // config.num_attention_heads
    config.hidden_size = kept
    if scales_epsilon(config):
        config.rms_norm_eps *= units / kept


def _layers(config: Any, structure: Structure, stack: str, cuts: Cuts) -> None:
    name = structure.layers[0].rpartition(".")[0]
    deleted = cuts.deleted_layers()[name]
    if stack == "decoder":
        keys: tuple[str, ...] = ("decoder_layers", "num_decoder_layers")
        if getattr(config, "is_decoder", False):
            keys += ("num_layers",)
    elif stack == "encoder":
        keys = ("encoder_layers", "num_layers", "num_hidden_layers")
    else:
        keys = ("num_hidden_layers",)
    lists = {
        key: value
        for key, value in vars(config).items()
        # `layer_types` and its relatives say something about each layer.
        if isinstance(value, list)
        and ("layer" in key or key in _PER_LAYER)
        and len(value) == getattr(config, keys[-1], None)
    }
    for key in keys:
        depth = getattr(config, key, None)
        if isinstance(depth, int):
            setattr(config, key, depth - len(deleted))
            if key in ("encoder_layers", "num_layers"):
                break
    for key, value in lists.items():
        setattr(config, key, [item for index, item in enumerate(value) if index not in deleted])
    _stages(config)


def _stages(config: Any) -> None:
    """Names that vision backbones give to the outputs of their layers, the last of which is given out."""
    stages, indices = getattr(config, "stage_names", None), getattr(config, "_out_indices", None)
    depth = getattr(config, "num_hidden_layers", None)
    if isinstance(stages, list) and isinstance(depth, int) and len(stages) > depth + 1:
        if indices == [len(stages) - 1]:
            config._out_indices, config._out_features = [depth], [stages[depth]]
        config.stage_names = stages[: depth + 1]


def _agreed(counted: Iterable[tuple[Structure, int]]) -> tuple[int, int] | None:
    """(units before, units after) when that is the same for all and a change."""
    sizes = {(structure.units, count) for structure, count in counted}
    if len(sizes) != 1:
        return None
    before, after = sizes.pop()
    return None if before == after else (before, after)
