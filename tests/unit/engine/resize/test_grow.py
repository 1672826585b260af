"""A checkpoint from before the cut loads into a model that was cut: it grows back, and training repeats itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import ds_compress
from tests.models import tiny_llama
from tests.single import init_single_process

CUT_AT = 4
LSQ = {
    "weight_quantization": {
        "shared_parameters": {"enabled": True, "learned_scale": True, "granularity": "per_channel"},
        "different_groups": {
            "g": {"params": {"start_bits": 4, "target_bits": 4}, "modules": ["mlp", "self_attn"]}
        },
    }
}
SPARSE = {
    "sparse_pruning": {
        "shared_parameters": {"enabled": True, "method": "l1", "schedule_offset": 1},
        "different_groups": {"g": {"params": {"dense_ratio": 0.3}, "modules": ["mlp"]}},
    }
}


def cut(*kinds: str, **shared: Any) -> dict[str, Any]:
    keys = {
        "enabled": True,
        "method": "l1",
        "schedule_offset": CUT_AT,
        "shrink_at_end_of_schedule": True,
        **shared,
    }
    groups = {"g": {"params": {"dense_ratio": 0.5}}}
    return {kind: {"shared_parameters": keys, "different_groups": groups} for kind in kinds}


def llama() -> nn.Module:
    return tiny_llama(layers=4, tied=False, vocab_size=40)


def engine_of(block: dict[str, Any], stage: int, **given: Any) -> Any:
    init_single_process()
    model = llama()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "compression_training": block,
    }
    if given.pop("client", False):
        named = list(model.named_parameters())
        groups = [{"params": [p for n, p in named if ".layers." not in n], "lr": 1e-2}]
        for at in range(4):
            groups.append({"params": [p for n, p in named if f".layers.{at}." in n], "lr": 1e-3 * (at + 1)})
        optimizer = torch.optim.AdamW(groups)
        rates = [lambda s, k=k: 1 / (1 + s + k) for k in range(5)]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates)
        return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)[
            0
        ]
    config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)[0]


def step(engine: Any, at: int) -> float:
    ids = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(at))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def size(engine: Any) -> int:
    return sum(torch.Size(getattr(p, "ds_shape", p.shape)).numel() for p in engine.module.parameters())


CASES: dict[str, tuple[int, dict[str, Any], bool]] = {
    "0 rows": (0, cut("row_pruning"), False),
    "1 layers, learned scales": (1, {**cut("depth_pruning"), **LSQ}, False),
    "2 rows, heads, weights": (2, {**cut("row_pruning", "head_pruning"), **SPARSE}, False),
    "3 rows, layers": (3, cut("row_pruning", "depth_pruning"), False),
    "0 layers, groups and rates of the client": (0, cut("depth_pruning"), True),
    "1 layers, groups, rates and scales": (1, {**cut("depth_pruning"), **LSQ}, True),
}


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_it_did_from_there(name: str, tmp_path: Path) -> None:
    stage, block, client = CASES[name]
    engine = engine_of(block, stage, client=client)
    model, whole = engine.module, size(engine)
    for at in range(2):
        step(engine, at)
    engine.save_checkpoint(str(tmp_path))
    first = [step(engine, at) for at in range(2, 7)]
    smaller = size(engine)
    engine.save_checkpoint(str(tmp_path / "cut"))
    assert smaller < whole
    for _ in range(2):  # back, forth over the cut, and back again
        engine.load_checkpoint(str(tmp_path))
        assert engine.module is model and size(engine) == whole
        assert (engine.compression.applied_steps, engine.global_steps) == (2, 2)
        assert model.config.num_hidden_layers == 4 and not engine.compression.shrunk_units
        assert [step(engine, at) for at in range(2, 7)] == first
        assert size(engine) == smaller
    engine.load_checkpoint(str(tmp_path))
    engine.load_checkpoint(str(tmp_path / "cut"))
    assert size(engine) == smaller and engine.compression.applied_steps == 7
    assert torch.isfinite(torch.tensor(step(engine, 7)))


@pytest.fixture
def trainer_state() -> Iterator[None]:
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    init_single_process()
    yield
    AcceleratorState._reset_state(True)
    unset_hf_deepspeed_config()


def _trained(folder: Path, block: dict[str, Any], stage: int) -> Trainer:
    """For six steps, of which the second is the best."""
    scores = iter([0.0, 1.0, 0.5, 0.4, 0.3, 0.2])
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 40, (6,), generator=generator) for _ in range(24)]
    trainer = Trainer(
        model=llama(),
        args=TrainingArguments(
            output_dir=str(folder),
            deepspeed={
                "train_micro_batch_size_per_gpu": "auto",
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
                "zero_optimization": {"stage": stage},
                "compression_training": block,
            },
            **{"use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 6, "learning_rate": 1e-2},
            **{"per_device_train_batch_size": 4, "eval_strategy": "steps", "save_strategy": "steps"},
            **{"eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2},
            **{"metric_for_best_model": "score", "greater_is_better": True, "logging_steps": 1},
        ),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in rows],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in rows[:4]],
        compute_metrics=lambda _: {"score": next(scores)},
    )
    trainer.train()
    return trainer


@pytest.mark.usefixtures("trainer_state")
class TestBestModelAtEnd:
    @pytest.mark.parametrize("stage", [2, 3])
    def test_from_before_the_cut_is_loaded_whole_with_a_warning(
        self, stage: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "ds_compress"):
            trainer = _trained(tmp_path / "run", cut("row_pruning", "depth_pruning"), stage)
        assert trainer.state.best_global_step == 2
        assert size(trainer.model_wrapped) == sum(p.numel() for p in llama().parameters())
        assert trainer.model_wrapped.compression.applied_steps == 2
        assert "2 optimizer steps were applied" in caplog.text
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(norms) == 6  # that of the cut, too

    def test_from_before_the_end_of_the_ramp_is_loaded_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        shared = {"schedule_offset": 1, "schedule_offset_end": 5, "schedule": "linear"}
        block = {"sparse_pruning": {**SPARSE["sparse_pruning"]}}
        block["sparse_pruning"]["shared_parameters"] = {
            **SPARSE["sparse_pruning"]["shared_parameters"],  # type: ignore[dict-item]
            **shared,
        }
        with caplog.at_level(logging.WARNING, "ds_compress"):
            trainer = _trained(tmp_path / "run", block, 2)
        session = trainer.model_wrapped.compression
        assert session.applied_steps == 2
        reached = session.metrics()["sparse_pruning/sparsity"]
        zeros = float((trainer.model.model.layers[0].mlp.up_proj.weight == 0).float().mean())
        assert zeros == pytest.approx(reached, abs=1e-3) and reached < 0.3
        assert "2 optimizer steps were applied" in caplog.text and "sparse_pruning (step 5)" in caplog.text


@pytest.mark.parametrize("stage", [0, 3])
def test_distillation_goes_on_from_there_too(stage: int, tmp_path: Path) -> None:
    """The teacher stays, and its hidden states are compared with those of layers that are back."""
    losses = {"logits": {"weight": 1.0}, "hidden": {"weight": 1.0}}
    block = {**cut("depth_pruning"), "distillation": {"enabled": True, "losses": losses}}
    init_single_process()
    torch.manual_seed(5)
    student, teacher = llama(), llama()
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "compression_training": block,
    }
    engine, *_ = ds_compress.initialize(
        model=student, model_parameters=student.parameters(), config=config, teacher=teacher
    )
    for at in range(2):
        step(engine, at)
    engine.save_checkpoint(str(tmp_path))

    def on() -> list[tuple[float, dict[str, float]]]:
        return [(step(engine, at), engine.compression.metrics()) for at in range(2, 7)]

    first = on()
    engine.load_checkpoint(str(tmp_path))
    assert on() == first
