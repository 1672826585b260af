"""Quantization-aware distillation: the task loss is left out by default, and only there."""

from __future__ import annotations

from typing import Any

import pytest

from ds_compress.config.schema.compression_training import parse_config

SELF = {"enabled": True, "self_teacher": {"weights": "initial"}}


@pytest.mark.parametrize(
    ("block", "weight"),
    [
        ({"scheme": "NVFP4", "distillation": SELF}, 0.0),
        ({"scheme": "W4A16", "distillation": SELF}, 0.0),
        ({"scheme": "NVFP4", "distillation": {**SELF, "task_loss_weight": 0.5}}, 0.5),
        ({"scheme": "NVFP4", "distillation": {"enabled": True, "teacher": "somewhere"}}, 1.0),
        ({"scheme": "NVFP4", "distillation": {**SELF, "self_teacher": {"weights": "ema"}}}, 1.0),
        ({"distillation": SELF}, 1.0),
        ({"scheme": "NVFP4", "distillation": {**SELF, "enabled": False}}, 1.0),
    ],
)
def test_the_task_loss(block: dict[str, Any], weight: float) -> None:
    config = parse_config(block)
    assert config.distillation is not None
    assert config.distillation.task_loss_weight == weight
    assert config.distillation.losses.logits is not None
    assert config.distillation.losses.logits.kind == "forward_kl"
    assert config.distillation.losses.logits.temperature == 1.0
