"""Distillation on a GPU: teachers whole, sharded and offloaded; logits in chunks, equal and in less memory."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

import ds_compress
from tests.gpu.where import ON, ON_CUDA
from tests.multirank import distilling
from tests.multirank.common import device, ds_config
from tests.multirank.distilling import EVERY_LOSS, LANGUAGE_LOSSES, block, llama, teacher_of_more

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(100)]


@functools.cache
def whole() -> dict[str, Any]:
    losses = {**EVERY_LOSS, "logits": {**EVERY_LOSS["logits"], "chunk_tokens": 0}}
    return distilling.run(0, block(losses, teacher_zero_stage=0), teacher_of_more())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("teacher", ["sharded", "offloaded"])
def test_every_loss_in_chunks(stage: int, teacher: str) -> None:
    settings: dict[str, Any] = {"teacher_offload": "cpu"} if teacher == "offloaded" else {}
    got = distilling.run(stage, block(EVERY_LOSS, **settings), teacher_of_more())
    assert got["losses"] == pytest.approx(whole()["losses"], abs=1e-4)
    assert set(got["metrics"]) == set(whole()["metrics"]) and not got["left"]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("name", [name for name in LANGUAGE_LOSSES if name != "every loss"])
def test_other_losses(name: str, stage: int) -> None:
    teacher = llama(layers=3, seed=3) if name == "maps" else teacher_of_more()
    got = distilling.run(stage, block(LANGUAGE_LOSSES[name]), teacher)
    assert all(loss == loss for loss in got["losses"]) and any(value > 0 for value in got["metrics"].values())


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.parametrize("weights", ["initial", "ema", "current"])
def test_the_model_as_its_own_teacher(weights: str, stage: int) -> None:
    chosen: dict[str, Any] = {"weights": weights, **({"decay": 0.75} if weights == "ema" else {})}
    got = distilling.run(stage, distilling.quantized({"logits": {}, "hidden": {}}, self_teacher=chosen))
    assert got["losses"] == pytest.approx(own(weights)["losses"], abs=2e-3)
    assert got["metrics"]["distillation/logits"] > 0


@functools.cache
def own(weights: str) -> dict[str, Any]:
    chosen: dict[str, Any] = {"weights": weights, **({"decay": 0.75} if weights == "ema" else {})}
    return distilling.run(0, distilling.quantized({"logits": {}, "hidden": {}}, self_teacher=chosen))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_sixteen_bits(stage: int, dtype: str) -> None:
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    runs = []
    for chunk in (7, 0):
        compression = block({"logits": {"chunk_tokens": chunk}, "hidden": {}})
        extra = {"fp16": {"enabled": True, "initial_scale_power": 4}} if dtype == "fp16" else {}
        runs.append(distilling.run(stage, compression, teacher_of_more().to(kind), dtype=dtype, **extra))
    assert runs[0]["losses"] == pytest.approx(runs[1]["losses"], abs=5e-2)


@pytest.mark.parametrize(
    ("name", "stage"), [("weights", 0), ("weights", 3), ("static and sparse", 3), ("bf16", 3)]
)
def test_layer_by_layer(name: str, stage: int) -> None:
    found = distilling._layer_by_layer(name, stage)
    assert found["masters follow"]
    assert found["results"]


def test_chunks_are_less_memory() -> None:
    """A vocabulary of 64 000: logits of student and teacher, whole in fp32, are 1 GB each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, tokens = (64000, 1024) if ON_CUDA else (500, 64)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=vocabulary,
    )
    ids = torch.randint(0, vocabulary, (4, tokens), generator=torch.Generator().manual_seed(0)).to(device())
    peaks, losses = [], []
    for chunk in (tokens // 4, 0):
        torch.manual_seed(0)
        student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
        engine, *_ = ds_compress.initialize(
            model=student,
            model_parameters=student.parameters(),
            config=ds_config(2, block({"logits": {"chunk_tokens": chunk}}), "bf16"),
            teacher=teacher.bfloat16(),
        )
        for _ in range(2):
            before = start_of_peak()
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            peaks.append(get_accelerator().max_memory_allocated() - before)
            engine.step()
            losses.append(loss.item())
        engine.destroy()
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-2), losses
    if ON_CUDA:  # where a step's memory is counted
        assert peaks[1] < 0.5 * peaks[3], [f"{peak / 1e6:.0f} MB" for peak in peaks]


def start_of_peak() -> int:
    get_accelerator().reset_peak_memory_stats()
    return int(get_accelerator().memory_allocated())


def test_the_device_is_the_one_that_was_asked_for() -> None:
    assert device().type == ON
