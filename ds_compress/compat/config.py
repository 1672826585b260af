"""The JSON as the removed library handed it around: one dict per technique, every key there.

`get_compression_config` checks the whole block first, with all its problems in one `ConfigError`, and returns the
shape that user code walked: `config["weight_quantization"]["shared_parameters"]["enabled"]`. `block_of_config` reads
that shape back, so either form may be given to `compression_scheduler`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

from ds_compress.compat.constants import (
    ACTIVATION_QUANTIZATION,
    CHANNEL_PRUNING,
    COMPRESSION_TRAINING,
    DIFFERENT_GROUPS,
    HEAD_PRUNING,
    LAYER_REDUCTION,
    ROW_PRUNING,
    SHARED_PARAMETERS,
    SPARSE_PRUNING,
    TECHNIQUE_ENABLED,
    WEIGHT_QUANTIZATION,
    WEIGHT_QUANTIZE_CHANGE_RATIO,
    WEIGHT_QUANTIZE_FP16_MIXED_QUANTIZE,
)
from ds_compress.config.recipes.catalog import KEY as RECIPE
from ds_compress.config.recipes.expand import expanded
from ds_compress.config.schema.compression_training import block_classes, parse_config, without_auto
from ds_compress.config.schema.formats import FormatParams
from ds_compress.config.schema.source import read_json
from ds_compress.errors import ConfigError, Problem, nearest, shown

SHARED_KEYS: dict[str, tuple[str, ...]] = {
    WEIGHT_QUANTIZATION: (
        "enabled",
        "quantizer_kernel",
        "schedule_offset",
        "quantize_groups",
        "quantize_verbose",
        "quantization_type",
        "quantize_weight_in_forward",
        "rounding",
        "fp16_mixed_quantize",
    ),
    ACTIVATION_QUANTIZATION: ("enabled", "quantization_type", "range_calibration", "schedule_offset"),
    SPARSE_PRUNING: ("enabled", "method", "schedule_offset"),
    ROW_PRUNING: ("enabled", "method", "schedule_offset"),
    HEAD_PRUNING: ("enabled", "method", "schedule_offset", "num_heads"),
    CHANNEL_PRUNING: ("enabled", "method", "schedule_offset"),
}
"""The keys of `shared_parameters` that the old library always filled in, by technique."""

_SNIP_KEYS = (
    "block_pattern",
    "dense_ratio",
    "schedule_offset_stride",
    "schedule_offset_end",
    "excluded_modules",
)


def deepspeed_config(config: Mapping[str, Any] | str | PathLike[str]) -> Mapping[str, Any]:
    """The DeepSpeed config as a mapping, from itself or the path of its JSON.

    Raises:
        ConfigError: a file that is not there or is no JSON, or something else than a mapping or a path.
    """
    if isinstance(config, str | PathLike):
        config = read_json(fspath(config))
    if not isinstance(config, Mapping):
        raise ConfigError([Problem("deepspeed_config", shown(config), "a dict, or the path of a JSON file")])
    return config


def block_of_config(config: Mapping[str, Any] | str | PathLike[str]) -> dict[str, Any] | None:
    """The `compression_training` block of a DeepSpeed config, of the block itself, or of what
    `get_compression_config` returned; None when there is no block."""
    whole = deepspeed_config(config)
    if COMPRESSION_TRAINING in whole:
        block = whole[COMPRESSION_TRAINING]
    elif whole.keys() & {*block_classes(), RECIPE}:
        block = whole
    else:
        near = next((key for key in map(str, whole) if nearest(key, [COMPRESSION_TRAINING], 0.8)), None)
        if near is not None:
            hint = f'did you mean "{COMPRESSION_TRAINING}"?'
            raise ConfigError([Problem("deepspeed_config", shown(near), "keys of a DeepSpeed config", hint)])
        return None
    if not isinstance(block, Mapping):
        raise ConfigError([Problem(COMPRESSION_TRAINING, shown(block), "an object")])
    return _schema_form(expanded(block)) if block else None


def enabled_blocks(block: Mapping[str, Any]) -> list[str]:
    """The keys of the blocks that do something; raises ConfigError for a bad block."""
    return list(parse_config(block).enabled_blocks())


def get_compression_config(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """All techniques of a DeepSpeed config with their defaults filled in, and the newer blocks as they are written.

    Raises:
        ConfigError: for a bad block.
    """
    block = block_of_config(param_dict) or {}
    parse_config(block)
    techniques = {key: _technique(key, block.get(key, {})) for key in SHARED_KEYS}
    return {**block, **techniques, LAYER_REDUCTION: get_layer_reduction(block)}


def get_layer_reduction(param_dict: Mapping[str, Any]) -> dict[str, Any]:
    """`layer_reduction` of a block: only `enabled` (False) unless it is."""
    own = dict(param_dict.get(LAYER_REDUCTION, {}))
    return own if own.get(TECHNIQUE_ENABLED) else {TECHNIQUE_ENABLED: False}


def get_quantize_enabled(param_dict: Mapping[str, Any]) -> bool:
    """Whether `weight_quantization` of a DeepSpeed config is enabled."""
    return WEIGHT_QUANTIZATION in enabled_blocks(block_of_config(param_dict) or {})


def _of_block(key: str, param_dict: Mapping[str, Any]) -> dict[str, Any]:
    return _technique(key, param_dict.get(key, {}))


get_weight_quantization = functools.partial(_of_block, WEIGHT_QUANTIZATION)
get_activation_quantization = functools.partial(_of_block, ACTIVATION_QUANTIZATION)
get_sparse_pruning = functools.partial(_of_block, SPARSE_PRUNING)
get_row_pruning = functools.partial(_of_block, ROW_PRUNING)
get_head_pruning = functools.partial(_of_block, HEAD_PRUNING)
get_channel_pruning = functools.partial(_of_block, CHANNEL_PRUNING)


def _technique(key: str, written: Mapping[str, Any]) -> dict[str, Any]:
    parsed = getattr(parse_config({key: written}), key)
    shared_model = parsed.shared_parameters
    keys = SHARED_KEYS[key]
    if key == SPARSE_PRUNING and shared_model.method == "snip_momentum":
        keys += _SNIP_KEYS
    defaults = shared_model.model_dump(mode="json")
    if key == SPARSE_PRUNING:
        defaults["block_pattern"] = shared_model.effective_pattern
        defaults["dense_ratio"] = shared_model.effective_dense_ratio
    shared = {name: defaults[name] for name in keys if defaults[name] is not None}
    shared |= without_auto(written.get(SHARED_PARAMETERS, {}))
    mixed = shared.pop(WEIGHT_QUANTIZE_FP16_MIXED_QUANTIZE, None)
    if mixed is not None:
        filled = {TECHNIQUE_ENABLED: False, WEIGHT_QUANTIZE_CHANGE_RATIO: 0.001, **mixed}
        shared[WEIGHT_QUANTIZE_FP16_MIXED_QUANTIZE] = filled[TECHNIQUE_ENABLED]
        shared[WEIGHT_QUANTIZE_CHANGE_RATIO] = filled[WEIGHT_QUANTIZE_CHANGE_RATIO]
    groups = {}
    for name, group in parsed.different_groups.items():
        groups[name] = {
            "params": _params(group.params),
            "modules": list(group.modules),
            "related_modules": None
            if group.related_modules is None
            else [list(r) for r in group.related_modules],
        }
    return {
        **{k: v for k, v in written.items() if k not in (SHARED_PARAMETERS, DIFFERENT_GROUPS)},
        SHARED_PARAMETERS: shared,
        DIFFERENT_GROUPS: groups,
    }


def _params(params: Any) -> dict[str, Any]:
    """All that the removed library had, defaults too, and of newer keys those that were given."""
    old = set(type(params).model_fields) - set(FormatParams.model_fields) - {"granularity"}
    return params.model_dump(mode="json", include=old | params.model_fields_set, exclude_none=True)


def _schema_form(block: Mapping[str, Any]) -> dict[str, Any]:
    """`get_compression_config` flattened one key and wrote absent ones as None: undone here."""
    made: dict[str, Any] = copy.deepcopy(dict(block))
    shared = made.get(WEIGHT_QUANTIZATION, {}).get(SHARED_PARAMETERS, {})
    if isinstance(shared.get(WEIGHT_QUANTIZE_FP16_MIXED_QUANTIZE), bool):
        shared[WEIGHT_QUANTIZE_FP16_MIXED_QUANTIZE] = {
            TECHNIQUE_ENABLED: shared[WEIGHT_QUANTIZE_FP16_MIXED_QUANTIZE],
            WEIGHT_QUANTIZE_CHANGE_RATIO: shared.pop(WEIGHT_QUANTIZE_CHANGE_RATIO, 0.001),
        }
    for technique in made.values():
        groups = technique.get(DIFFERENT_GROUPS, {}) if isinstance(technique, dict) else {}
        for group in groups.values() if isinstance(groups, dict) else ():
            if isinstance(group, dict) and group.get("related_modules", ()) is None:
                del group["related_modules"]
    return made
