"""A scheme with QAD through Hugging Face's Trainer and its `deepspeed=` argument, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import ds_compress
from ds_compress.engine.registry import run_of
from tests.models import tiny_llama
from tests.unit.hf.test_trainer import arguments, fresh_accelerator

__all__ = ["fresh_accelerator"]

QAD: dict[str, Any] = {
    "scheme": "NVFP4",
    "kv_cache": "fp8",
    "distillation": {"enabled": True, "self_teacher": {"weights": "initial"}},
}


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(0, 128, (8,), generator=generator) for _ in range(16)]
    return [{"input_ids": row, "labels": row} for row in rows]


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_without_a_task_loss_and_exports_what_it_trained(
    tmp_path: Path, stage: int, checkpointing: bool
) -> None:
    model = tiny_llama(hidden=64, intermediate=128)
    given = arguments(tmp_path, QAD, stage, gradient_checkpointing=checkpointing)
    trainer = Trainer(model=model, args=given, train_dataset=texts())
    trainer.train()
    run = run_of(model)
    assert run is not None
    metrics = run.metrics()
    assert metrics["weight_quantization/mean_bits"] == 4 and metrics["distillation/logits"] > 0
    assert "distillation/task" not in metrics or run.given.distillation.task_loss_weight == 0
    report = ds_compress.export(trainer, tmp_path / "out", "compressed-tensors", check=False)
    assert (tmp_path / "out" / "model.safetensors").exists() and report is not None
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        q, k = (file.get_tensor(f"model.layers.0.self_attn.{part}_proj.weight_global_scale") for part in "qk")
    assert torch.equal(q, k)
    assert {"model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"} <= names
    assert "model.layers.0.mlp.down_proj.input_global_scale" in names
