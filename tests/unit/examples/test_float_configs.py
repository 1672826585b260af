"""The shipped configs of float formats train, and quantize from the step that they name."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)
from tests.models import tiny_llama
from tests.multirank.common import engine_of, train
from tests.single import init_single_process

FOLDER = Path(__file__).parents[3] / "ds_configs"
MEAN_BITS = {
    "nvfp4_qad_zero3": 4.0,
    "fp8_attention_nvfp4_mlp_zero2": pytest.approx((65_536 * 8 + 98_304 * 4) / 163_840),
    "qlora_nvfp4_zero2": 4.0,
}


def model_of(name: str) -> nn.Module:
    model = tiny_llama(hidden=128, intermediate=256, heads=2)
    if "qlora" not in name:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))


def in_few_steps(config: dict[str, Any]) -> dict[str, Any]:
    """Warm-up of two steps, one micro-step a step, and torch's own Adam, which needs no compiler."""
    short = copy.deepcopy(config)
    short |= {"gradient_accumulation_steps": 1, "steps_per_print": 10**9}
    short["optimizer"]["params"]["torch_adam"] = True
    for block in ("weight_quantization", "activation_quantization"):
        shared = short["compression_training"].get(block, {}).get("shared_parameters", {})
        if "schedule_offset" in shared:
            shared["schedule_offset"] = 2
    return short


@pytest.mark.parametrize("name", MEAN_BITS)
def test_it_trains(name: str) -> None:
    init_single_process()
    config = in_few_steps(json.loads((FOLDER / f"{name}.json").read_text()))
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 128, (1, 16), generator=generator) for _ in range(4)]
    model = model_of(name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with engine_of(model, config, model_parameters=trained) as engine:
        losses = train(engine, iter([{"input_ids": row, "labels": row} for row in rows]))
        metrics = engine.compression.metrics()
    assert all(map(math.isfinite, losses))
    assert metrics["weight_quantization/mean_bits"] == MEAN_BITS[name]
