"""transformers' Trainer on a GPU, with the block in its DeepSpeed JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.gpu.runs import everything
from tests.gpu.where import ON, ON_CUDA
from tests.models import tiny_bert
from tests.multirank.common import batches

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]


@pytest.fixture(autouse=True)
def no_config_for_later_tests() -> Iterator[None]:
    """transformers would go on loading models as this Trainer's ZeRO stage wants them."""
    yield
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


@pytest.mark.parametrize("stage", [2, 3])
def test_trains_saves_and_loads(stage: int, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
        "zero_optimization": {
            "stage": stage,
            **({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}),
        },
        "compression_training": {k: v for k, v in everything().items() if k == "sparse_pruning"},
    }
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        deepspeed=config,
        bf16=True,
        max_steps=6,
        save_steps=3,
        per_device_train_batch_size=4,
        logging_steps=2,
        report_to=[],
        use_cpu=not ON_CUDA,
        average_tokens_across_devices=False,
    )
    rows = [{k: v[i].cpu() for k, v in batch.items()} for batch in batches(6) for i in range(4)]
    trainer = Trainer(model=tiny_bert(), args=arguments, train_dataset=rows)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if any("sparsity" in key for key in entry)]
    assert logs
    assert trainer.model_wrapped.device.type == ON
    trainer.save_model(str(tmp_path / "out"))
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    weight = stock.bert.encoder.layer[1].intermediate.dense.weight
    assert int(weight.count_nonzero()) == weight.numel() // 2
    assert (tmp_path / "checkpoint-3").exists() and torch.isfinite(weight).all()
