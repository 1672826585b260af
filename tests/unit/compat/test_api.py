"""The three ways of using the removed library, its import paths, and its helpers."""

from __future__ import annotations

import copy
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.compat import (
    compression_scheduler,
    init_compression,
    redundancy_clean,
)
from ds_compress.compat.basic_layer import (
    BNLayer_Compress,
    ColumnParallelLinear_Compress,
    Conv2dLayer_Compress,
    Embedding_Compress,
    LinearLayer_Compress,
)
from ds_compress.quant.layers import QATModule
from tests.legacy_blocks import CHANNELS, ENCODER_BLOCKS, HEADS, REDUCTION, ConvNet, sparse_pruning
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, train

pytestmark = pytest.mark.usefixtures("single_process")

STEPS = 8


def in_loop(
    model: nn.Module, config: Any, data: Any = None, scheduler: Any = None, optimizer: Any = None
) -> list[float]:
    """Plain torch with the optimizer of `ds_config`."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = scheduler or compression_scheduler(model, config)
    losses = []
    for batch in batches(STEPS) if data is None else data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def training_bert(**sizes: Any) -> nn.Module:
    return tiny_bert(**sizes).train()


OLD_NAMES = {
    "": "init_compression redundancy_clean compression_scheduler convert_conv1d_to_linear",
    "compress": "init_compression redundancy_clean student_initialization get_module_name get_compress_methods "
    "check_deepspeed_config get_compression_config",
    "scheduler": "compression_scheduler",
    "helper": "convert_conv1d_to_linear module_replacement compression_preparation fix_compression "
    "is_module_compressible recursive_getattr recursive_setattr",
    "basic_layer": "LinearLayer_Compress Conv2dLayer_Compress Embedding_Compress BNLayer_Compress QuantAct "
    "ColumnParallelLinear_Compress RowParallelLinear_Compress TopKBinarizer SymQuantizer",
    "utils": "TopKBinarizer SymQuantizer AsymQuantizer TernaryQuantizer BinaryQuantizer",
    "config": "get_compression_config get_quantize_enabled get_layer_reduction get_weight_quantization",
    "constants": "COMPRESSION_TRAINING SHARED_PARAMETERS DIFFERENT_GROUPS WEIGHT_QUANTIZATION "
    "WEIGHT_QUANTIZE_IN_FORWARD_ENABLED SPARSE_PRUNING_SCHEDULE_OFFSET_END HEAD_PRUNING_NUM_HEADS TEACHER_LAYER",
}


@pytest.mark.parametrize("path", OLD_NAMES)
def test_old_import_paths(path: str) -> None:
    module = importlib.import_module(f"ds_compress.compat.{path}".rstrip("."))
    missing = [name for name in OLD_NAMES[path].split() if not hasattr(module, name)]
    assert not missing


# -- the engine takes over -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_block", [True, False])
def test_the_engine_takes_a_prepared_model_over_once(with_block: bool) -> None:
    """`with_block` False: the JSON that the engine reads has lost the block, which init_compression had."""
    config = ds_config(0, ENCODER_BLOCKS["weight_quantization"])
    with engine_of(tiny_bert(), copy.deepcopy(config)) as engine:
        expected = train(engine, batches(STEPS))
    model = tiny_bert()
    assert init_compression(model, config) is model
    swapped = [module for module in model.modules() if isinstance(module, QATModule)]
    assert len(swapped) == 8
    assert init_compression(model, config) is model
    with engine_of(model, config if with_block else ds_config(0)) as engine:
        scheduler = compression_scheduler(engine, config)
        losses = []
        for batch in batches(STEPS):
            losses += train(engine, iter([batch]))
            scheduler.step()
        assert engine.compression.applied_steps == scheduler.training_steps == STEPS
        assert [m for m in model.modules() if isinstance(m, QATModule)] == swapped
        assert scheduler.state_dict() == {}
    assert losses == expected


def test_an_engine_after_a_scheduler_leaves_the_scheduler_nothing_to_do() -> None:
    """Were the loop's hooks still there, topk would hide its hidden values twice."""
    config = ds_config(0, sparse_pruning("topk", schedule_offset=1))
    with engine_of(tiny_bert(), config) as engine:
        expected = train(engine, batches(STEPS))
    model = init_compression(tiny_bert(), config)
    scheduler = compression_scheduler(model, config)
    losses = []
    with engine_of(model, config) as engine:
        for batch in batches(STEPS):
            losses += train(engine, iter([batch]))
            scheduler.step()
        assert engine.compression.applied_steps == scheduler.training_steps == STEPS
    assert losses == expected


def test_the_given_teacher_fills_layers_and_is_imitated() -> None:
    teacher = tiny_bert(seed=3, layers=4)
    distilled = {**REDUCTION, "distillation": {"enabled": True}}
    student = init_compression(tiny_bert(seed=9), ds_config(0, distilled), teacher_model=teacher)
    for index, theirs in enumerate((1, 3)):
        own = student.bert.encoder.layer[index].output.dense.weight
        assert torch.equal(own, teacher.bert.encoder.layer[theirs].output.dense.weight)
    with torch.no_grad():
        student.classifier.weight.add_(1.0)  # a second preparation would copy the teacher's again
    changed = student.classifier.weight.clone()
    with engine_of(student, ds_config(0, distilled)) as engine:
        assert torch.equal(student.classifier.weight, changed)
        train(engine, batches(2))
        assert engine.compression.teacher.model is teacher
        assert engine.compression.metrics()["distillation/logits"] > 0


def test_a_teacher_that_nothing_asks_for_is_left_alone() -> None:
    teacher = tiny_bert(seed=3).train()
    init_compression(tiny_bert(), ds_config(0, ENCODER_BLOCKS["row_pruning"]), teacher_model=teacher)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("given", ["engine", "module"])
def test_redundancy_clean_of_an_engine_and_of_its_module(given: str) -> None:
    config = ds_config(0, HEADS)
    model = init_compression(tiny_bert(), config)
    with engine_of(model, config) as engine:
        train(engine, batches(STEPS))
        cleaned = redundancy_clean(engine if given == "engine" else engine.module, config)
    assert cleaned is model
    assert [layer.attention.self.query.out_features for layer in model.bert.encoder.layer] == [16, 16]


# -- nothing to do -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [{}, {"train_batch_size": 4, "activation_checkpointing": {}}, {"compression_training": {}}, "disabled"],
)
def test_without_anything_enabled_nothing_happens(
    config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if config == "disabled":
        block = copy.deepcopy(ENCODER_BLOCKS["row_pruning"])
        block["row_pruning"]["shared_parameters"]["enabled"] = False
        config = tmp_path / "ds.json"
        config.write_text(json.dumps(ds_config(0, block)))
    model = tiny_bert()
    before = dict(vars(model))
    with caplog.at_level(logging.INFO, "ds_compress"):
        assert init_compression(model, config) is model
    assert "nothing is enabled" in caplog.text
    assert vars(model) == before and not any(isinstance(m, QATModule) for m in model.modules())
    scheduler = compression_scheduler(model, config)
    scheduler.step()
    assert scheduler.training_steps == 0
    assert redundancy_clean(model, config) is model


def test_a_misspelt_key_is_not_nothing() -> None:
    with pytest.raises(ds_compress.ConfigError, match='did you mean "compression_training"'):
        init_compression(tiny_bert(), {"compresion_training": HEADS})


# -- without an engine ---------------------------------------------------------------------------------------------


def test_the_smaller_model_computes_what_the_masked_one_did() -> None:
    config = ds_config(0, {**HEADS, **ENCODER_BLOCKS["row_pruning"]})
    model = init_compression(training_bert(), config)
    in_loop(model, config)
    model.eval()
    batch = next(batches(1, seed=5))
    expected, size = model(**batch).logits, sum(p.numel() for p in model.parameters())
    copied = copy.deepcopy(model)
    assert redundancy_clean(nn.DataParallel(model), config) is model
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) < size
    assert model.config.intermediate_size == 48
    # A copy has no session: its zeros say what goes.
    redundancy_clean(copied, config)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), copied.parameters(), strict=True))


def test_masks_decide_and_not_weights() -> None:
    config = ds_config(0, HEADS)
    model = init_compression(training_bert(), config)
    in_loop(model, config)
    attention = model.bert.encoder.layer[0].attention
    chunks = attention.output.dense.weight.detach().view(32, 4, 8)
    gone = int(chunks.abs().sum((0, 2)).argmin())
    kept = [head for head in range(4) if bool((chunks[:, head] != 0).any())]
    expected = attention.self.query.weight.detach().view(4, 8, 32)[kept].reshape(16, 32).clone()
    with torch.no_grad():
        attention.output.dense.weight.view(32, 4, 8)[:, gone] = 100.0
    redundancy_clean(model, config)
    assert torch.equal(attention.self.query.weight, expected)


def test_quantizers_stay_for_an_export() -> None:
    config = ds_config(0, ENCODER_BLOCKS["weight_quantization"])
    model = init_compression(training_bert(), config)
    in_loop(model, config)
    batch = next(batches(1))
    expected = model.eval()(**batch).logits
    cleaned = redundancy_clean(model, config)
    assert torch.equal(cleaned(**batch).logits, expected)
    assert sum(isinstance(module, QATModule) for module in cleaned.modules()) == 8


# -- refused -------------------------------------------------------------------------------------------------------


class Mpu:
    def __init__(self, size: int) -> None:
        self.size = size

    def get_model_parallel_world_size(self) -> int:
        return self.size


def unsupported() -> Iterator[tuple[str, Any]]:
    config = ds_config(0, sparse_pruning("topk"))
    other = ds_config(0, sparse_pruning("l1"))

    def another_block_later() -> None:
        init_compression(init_compression(tiny_bert(), config), other)

    def another_block_in_the_engine() -> None:
        with engine_of(init_compression(tiny_bert(), config), other):
            pass

    def a_model_around_it() -> None:
        with engine_of(nn.Sequential(init_compression(tiny_bert(), config)), config):
            pass

    def trained_without_engine() -> None:
        model = init_compression(training_bert(), config)
        in_loop(model, config, batches(1))
        with engine_of(model, config):
            pass

    def closure() -> None:
        model = init_compression(training_bert(), config)
        compression_scheduler(model, config)
        torch.optim.SGD(model.parameters(), lr=0.1).step(lambda: 0.0)

    def distillation_in_a_loop() -> None:
        block = ds_config(0, {"distillation": {"enabled": True}})
        compression_scheduler(init_compression(tiny_bert(), block, tiny_bert(seed=1)), block)

    yield "one block for one model", another_block_later
    yield "another block than init_compression", another_block_in_the_engine
    yield "the very model", a_model_around_it
    yield "an untrained one", trained_without_engine
    yield "closure", closure
    yield "a DeepSpeed engine", distillation_in_a_loop
    yield "1: layers that are split", lambda: init_compression(tiny_bert(), config, mpu=Mpu(2))
    yield "after init_compression", lambda: compression_scheduler(tiny_bert(), config)
    yield "the same block", lambda: compression_scheduler(init_compression(tiny_bert(), config), other)
    yield "path of a JSON file", lambda: init_compression(tiny_bert(), 7)  # type: ignore[arg-type]
    yield "path of a JSON file", lambda: init_compression(tiny_bert(), "nowhere.json")


@pytest.mark.parametrize(("words", "attempt"), unsupported())
def test_refusals(words: str, attempt: Any) -> None:
    with pytest.raises((ds_compress.ConfigError, RuntimeError), match=words):
        attempt()


def test_an_mpu_of_one_process_is_fine() -> None:
    model = init_compression(tiny_bert(), ds_config(0, HEADS), mpu=Mpu(1))
    assert isinstance(model.bert.encoder.layer[0].attention.output.dense, LinearLayer_Compress)


# -- names and helpers ---------------------------------------------------------------------------------------------


def test_isinstance_says_what_was_prepared() -> None:
    block = copy.deepcopy(ENCODER_BLOCKS["weight_quantization"])
    block["weight_quantization"]["different_groups"]["wq1"]["modules"].append("word_embeddings")
    block |= ENCODER_BLOCKS["row_pruning"]
    model = init_compression(tiny_bert(), block)
    layer = model.bert.encoder.layer[0]
    assert isinstance(layer.attention.self.query, LinearLayer_Compress)
    assert isinstance(layer.output.dense, LinearLayer_Compress)  # only its inputs are pruned
    assert isinstance(model.bert.embeddings.word_embeddings, Embedding_Compress)
    assert not isinstance(model.bert.pooler.dense, LinearLayer_Compress)
    assert not isinstance(layer.attention.self.query, Embedding_Compress | ColumnParallelLinear_Compress)
    assert not isinstance(tiny_bert().bert.encoder.layer[0].attention.self.query, LinearLayer_Compress)
    assert isinstance(copy.deepcopy(layer).attention.self.query, LinearLayer_Compress)
    assert isinstance(LinearLayer_Compress(3, 4, bias=False), LinearLayer_Compress)
    network = init_compression(ConvNet(), CHANNELS)
    assert isinstance(network.conv1, Conv2dLayer_Compress) and isinstance(network.norm, BNLayer_Compress)
