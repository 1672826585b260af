"""Configs of mixtures of experts: the keys that hold widths of experts, and those that say which layers have any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ds_compress.structure.prunable_group import PrunableGroup

_EXPERT_WIDTHS = ("moe_intermediate_size", "expert_intermediate_size", "expert_ffn_hidden_size", "expert_dim")
_SHARED_WIDTHS = (
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "moe_shared_expert_intermediate_size",
)
_DENSE_WIDTHS = ("intermediate_size_mlp", "dense_intermediate_size")
_SHARED_COUNTS = ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts", "num_shared_expert")
_NUMBERS_OF_LAYERS = ("mlp_only_layers", "moe_layers")
"""Lists of the numbers of layers."""


def width_keys(group: PrunableGroup) -> tuple[str, ...]:
    """The keys that may hold the width of a feed-forward block, before those that all models have."""
    if group.parts > 1:
        return _EXPERT_WIDTHS
    if "shared" in group.name:
        return _SHARED_WIDTHS
    return _EXPERT_WIDTHS if "expert" in group.name else _DENSE_WIDTHS


def is_shared_in_multiples(config: Any, group: PrunableGroup) -> bool:
    """Whether it is a shared expert as wide as several others together, which no key of its own says."""
    if "shared" not in group.name or any(isinstance(getattr(config, k, None), int) for k in _SHARED_WIDTHS):
        return False
    count, width = _count_key(config), _width(config)
    return count is not None and bool(width) and group.width == width * getattr(config, count)


def set_shared_multiple(config: Any, width: int) -> None:
    """Writes how many experts the shared one of `width` stands for, beside the width of experts that the config has."""
    count, of_one = _count_key(config), _width(config)
    if count is not None and of_one and width % of_one == 0:
        setattr(config, count, width // of_one)


def set_mixture_depth(config: Any, depth: int, kept: Sequence[int]) -> None:
    """Which of the layers that are left, `kept` of `depth`, are mixtures, where numbers of layers say so."""
    step = getattr(config, "decoder_sparse_step", 1)
    if isinstance(step, int) and step > 1:
        # A period does not survive the deletion: the dense layers are listed instead.
        listed = set(getattr(config, "mlp_only_layers", None) or ())
        dense = [layer for layer in range(depth) if layer in listed or (layer + 1) % step]
        config.decoder_sparse_step, config.mlp_only_layers = 1, dense
    for key in _NUMBERS_OF_LAYERS:
        numbers = getattr(config, key, None)
        if isinstance(numbers, list):
            setattr(config, key, [new for new, old in enumerate(kept) if old in numbers])
    for key in ("first_k_dense_replace", "moe_layer_start_index"):
        first = getattr(config, key, None)
        if isinstance(first, int):
            setattr(config, key, sum(layer < first for layer in kept))
    last = getattr(config, "moe_layer_end_index", None)
    if isinstance(last, int) and last >= 0:
        config.moe_layer_end_index = sum(layer <= last for layer in kept) - 1


def is_list_of_numbers(key: str) -> bool:
    """Whether a list of this key has numbers of layers, and not an item for each layer."""
    return key in _NUMBERS_OF_LAYERS


def _count_key(config: Any) -> str | None:
    return next((k for k in _SHARED_COUNTS if isinstance(getattr(config, k, None), int)), None)


def _width(config: Any) -> int:
    width = next((getattr(config, k) for k in _EXPERT_WIDTHS if hasattr(config, k)), None)
    return width if isinstance(width, int) else 0
