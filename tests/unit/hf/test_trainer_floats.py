"""A scheme with QAD through Hugging Face's Trainer and its `deepspeed=` argument, and through accelerate alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DummyOptim
from transformers import Trainer

import ds_compress
from ds_compress.engine.registry import run_of
from tests.models import tiny_llama
from tests.multirank.common import ds_config, engine_of
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


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_accelerate_alone_trains_what_the_engine_does(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop of one's own around `Accelerator.prepare`, beside one around `deepspeed.initialize`."""
    from accelerate import Accelerator
    from accelerate.utils import DeepSpeedPlugin

    config = ds_config(stage, QAD, gradient_clipping=1.0)
    batches = [torch.stack([text["input_ids"] for text in texts()[at : at + 4]]) for at in (0, 4, 8, 12)]
    losses: dict[str, list[float]] = {"accelerate": [], "engine": []}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # as `accelerate launch --use_deepspeed` does
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = tiny_llama(hidden=64, intermediate=128)
    prepared, optimizer = accelerator.prepare(model, DummyOptim(model.parameters()))
    for ids in batches:
        loss = prepared(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses["accelerate"].append(loss.item())
    metrics = prepared.compression.metrics()
    assert metrics["weight_quantization/mean_bits"] == 4 and metrics["distillation/logits"] > 0
    report = ds_compress.export(prepared, tmp_path / "out", "compressed-tensors", check=False)
    assert report is not None and (tmp_path / "out" / "model.safetensors").exists()
    prepared.destroy()
    with engine_of(tiny_llama(hidden=64, intermediate=128), config) as engine:
        for ids in batches:
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            losses["engine"].append(loss.item())
    torch.testing.assert_close(losses["accelerate"], losses["engine"], rtol=0, atol=0)
