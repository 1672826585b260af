"""Top-level keys that DeepSpeed has removed beside `compression_training`: what becomes of each in a migrated JSON.

A key that is switched off goes. One that is on goes where nothing changes without it, is translated where this library
has its meaning (`quantize_training`), and is refused otherwise, with DeepSpeed's own words where ours are missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ds_compress.engine.zero.internals import removed_config_keys
from ds_compress.errors import ROOT, ConfigError, Problem, nearest, shown

Json = dict[str, Any]

_HARMLESS = {
    "graph_harvesting": "removed: it saved time on CUDA and changed no number",
    "sparse_gradients": "removed: gradients of an Embedding(sparse=True) need no flag, others are reduced dense",
}
_INSTEAD = {
    "amp": 'use "bf16", "fp16" or "torch_autocast"',
    "nebula": "save with engine.save_checkpoint, and remove the block",
    "elasticity": "set train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps",
    "curriculum_learning": "move it to data_efficiency.data_sampling.curriculum_learning",
    "eigenvalue": "remove it: every layer then follows the same quantization_period",
}
_SCHEDULE_DEFAULTS = {"quantize_period": 1000, "schedule_offset": 1000}
_BITS_DEFAULTS = {"start_bits": 16, "target_bits": 8}
_MOQ_KEYS = (
    "enabled",
    "quantize_verbose",
    "quantizer_kernel",
    "quantize_type",
    "quantize_algo",
    "quantize-algo",
    "quantize_bits",
    "quantize_schedule",
    "quantize_groups",
    "fp16_mixed_quantize",
    "eigenvalue",
)


def without_removed_keys(config: Json) -> Iterator[tuple[str, str]]:
    """Edits a DeepSpeed config in place; yields (path, what was done and why).

    Raises:
        ConfigError: keys that are on and have no counterpart, all of them.
    """
    problems: list[Problem] = []
    top_level, of_zero = removed_config_keys()
    if "quantize_training" in config:
        yield from _quantize_training(config, problems)
    for key in [key for key in config if key in top_level and key not in (ROOT, "quantize_training")]:
        yield from _switched_off(config, key, key, top_level[key], problems)
    written = config.get("zero_optimization")
    zero: Json = written if isinstance(written, dict) else {}
    for key in [key for key in zero if key in of_zero]:
        yield from _switched_off(zero, key, f"zero_optimization.{key}", of_zero[key], problems)
    if problems:
        raise ConfigError(problems)


def _switched_off(
    own: Json, key: str, path: str, message: str, problems: list[Problem]
) -> Iterator[tuple[str, str]]:
    value = own[key]
    is_on = value.get("enabled", True) if isinstance(value, Mapping) else value not in (None, False, 0, -1)
    if not is_on:
        del own[key]
        yield path, "removed: it was switched off, and DeepSpeed refuses the key"
    elif key in _HARMLESS:
        del own[key]
        yield path, _HARMLESS[key]
    else:
        hint = _INSTEAD.get(key, message)
        problems.append(Problem(path, shown(value), "nothing: DeepSpeed has removed it", hint))


def _quantize_training(config: Json, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """MoQ as its own block, before `compression_training` had one for it."""
    path = "quantize_training"
    old = config[path]
    found = list(_moq_problems(old, config))
    if found:
        problems += found
        return
    del config[path]
    if old.get("enabled", False) is not True:
        yield path, "removed: it was switched off, and DeepSpeed refuses the key"
        return
    algorithm = old.get("quantize_algo", old.get("quantize-algo", {}))
    schedule = {**_SCHEDULE_DEFAULTS, **old.get("quantize_schedule", {})}
    bits = {**_BITS_DEFAULTS, **old.get("quantize_bits", {})}
    shared = {
        "enabled": True,
        "quantizer_kernel": old.get("quantizer_kernel", False),
        "schedule_offset": schedule["schedule_offset"],
        "quantize_groups": old.get("quantize_groups", 1),
        "quantize_verbose": old.get("quantize_verbose", False),
        "quantization_type": algorithm.get("q_type", old.get("quantize_type", "symmetric")),
        "quantize_weight_in_forward": False,
        "rounding": algorithm.get("rounding", "nearest"),
        "fp16_mixed_quantize": old.get("fp16_mixed_quantize", {"enabled": False}),
    }
    params = {**bits, "quantization_period": schedule["quantize_period"]}
    block = config.setdefault(ROOT, {})
    block["weight_quantization"] = {
        "shared_parameters": shared,
        "different_groups": {"all": {"params": params, "modules": ["."]}},
    }
    yield (
        path,
        (
            f"became {ROOT}.weight_quantization over all layers and embeddings, with the same bits, period and groups; "
            "an embedding has one scale per row, and weights that are tied must be claimed once (excluded_modules)"
        ),
    )


def _moq_problems(old: Any, config: Mapping[str, Any]) -> Iterator[Problem]:
    path = "quantize_training"
    if not isinstance(old, Mapping):
        yield Problem(path, shown(old), "an object")
        return
    if old.get("enabled", False) is not True:
        return
    for key in old:
        if key not in _MOQ_KEYS:
            near = nearest(str(key), _MOQ_KEYS)
            hint = f'did you mean "{near}"?' if near else "remove it: it was never read"
            yield Problem(f"{path}.{key}", f"the unknown key {shown(key)}", "the keys of MoQ", hint)
    for key in ("quantize_algo", "quantize-algo", "quantize_bits", "quantize_schedule", "eigenvalue"):
        if not isinstance(old.get(key, {}), Mapping):
            yield Problem(f"{path}.{key}", shown(old[key]), "an object")
            return
    if old.get("eigenvalue", {}).get("enabled", False):
        hint = "set it to false: every layer then follows the same period"
        allowed = "false: periods that follow each layer's curvature are not built here"
        yield Problem(f"{path}.eigenvalue.enabled", "true", allowed, hint)
    block = config.get(ROOT)
    if isinstance(block, Mapping) and "weight_quantization" in block:
        got = f"enabled, beside {ROOT}.weight_quantization"
        yield Problem(path, got, "one of the two", "remove the one that does not hold")
