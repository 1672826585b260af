"""A whole DeepSpeed JSON around the block of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ds_compress.config.recipes.catalog import STEPS, Recipe
from ds_compress.config.recipes.merge import merged
from ds_compress.config.recipes.schedule import scaled
from ds_compress.errors import ROOT

_WARM_UP = 20
"""One step of so many goes by before the learning rate is what it says."""
_WIDTH = 110
_AUTO = "auto"


def whole_config(
    recipe: Recipe,
    stage: int,
    *,
    overrides: Mapping[str, Any] | None = None,
    batch_size: int = 4,
    steps: int = STEPS,
    on_gpu: bool = False,
    for_trainer: bool = False,
) -> dict[str, Any]:
    """A DeepSpeed config that trains by `recipe`, its block written out.

    overrides: merged over the block. batch_size: of each process. steps: optimizer steps of the run, with which
    schedules and the learning rate end. on_gpu: with DeepSpeed's fused Adam, which it compiles; else torch's own.
    for_trainer: what TrainingArguments decide is "auto".
    """
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": batch_size,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "weight_decay": 0.01, "torch_adam": True}},
        "scheduler": {"type": "WarmupDecayLR", "params": {}},
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
    }
    if stage == 3:
        base["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    config: dict[str, Any] = merged(base, recipe.deepspeed)
    optimizer = config["optimizer"]["params"]
    if on_gpu:
        del optimizer["torch_adam"]
    schedule = config["scheduler"]["params"]
    schedule["total_num_steps"] = steps
    schedule["warmup_num_steps"] = max(1, steps // _WARM_UP)
    schedule["warmup_max_lr"] = optimizer["lr"]
    schedule["warmup_type"] = "linear"
    if for_trainer:
        _leave_to_trainer(config)
    config[ROOT] = merged(scaled(recipe.block, steps), overrides or {})
    return config


def _leave_to_trainer(config: dict[str, Any]) -> None:
    """A value of the JSON that is not the one of TrainingArguments ends the Trainer with an error."""
    config["train_micro_batch_size_per_gpu"] = config["gradient_accumulation_steps"] = _AUTO
    config["gradient_clipping"] = _AUTO
    config["bf16"] = {"enabled": _AUTO}
    config["optimizer"]["params"] |= {"lr": _AUTO, "weight_decay": _AUTO}
    config["scheduler"]["params"] |= dict.fromkeys(
        ("total_num_steps", "warmup_num_steps", "warmup_max_lr"), _AUTO
    )


def json_text(value: Any) -> str:
    """JSON in which whatever fits a line stands in one."""
    return _text(value, 0) + "\n"


def _text(value: Any, indent: int, before: int = 0) -> str:
    line = json.dumps(value, ensure_ascii=False)
    if indent + before + len(line) < _WIDTH or not isinstance(value, dict | list) or not value:
        return line
    inner = indent + 2
    if isinstance(value, list):
        rows = [_text(item, inner) for item in value]
    else:
        keys = [json.dumps(key, ensure_ascii=False) for key in value]
        rows = [
            f"{key}: {_text(item, inner, len(key) + 3)}"
            for key, item in zip(keys, value.values(), strict=True)
        ]
    first, last = "{}" if isinstance(value, dict) else "[]"
    body = ",\n".join(f"{' ' * inner}{row}" for row in rows)
    return f"{first}\n{body}\n{' ' * indent}{last}"
