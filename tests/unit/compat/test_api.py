"""The three ways of using the removed library, its import paths, and its helpers."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import ds_compress
from ds_compress.compat import (
    compression_scheduler,
    convert_conv1d_to_linear,
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
from ds_compress.compat.compress import get_compress_methods, get_module_name, student_initialization
from ds_compress.compat.config import get_compression_config, get_quantize_enabled
from ds_compress.compat.helper import (
    compression_preparation,
    fix_compression,
    module_replacement,
    recursive_getattr,
    recursive_setattr,
)
from ds_compress.engine.step import loop
from ds_compress.quant.layers import QATModule
from tests.legacy_blocks import CHANNELS, ENCODER_BLOCKS, HEADS, REDUCTION, ConvNet, images, sparse_pruning
from tests.multirank.common import batches, ds_config, engine_of, full_weights, tiny_bert, train
from tests.single import init_single_process

STEPS = 8


@pytest.fixture(autouse=True, scope="module")
def single_process() -> None:
    init_single_process()


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


@pytest.mark.parametrize("name", ["sparse_pruning_topk", "sparse_pruning_snip_momentum", "head_pruning"])
def test_a_plain_loop_trains_as_the_engine_does(name: str) -> None:
    config = ds_config(0, ENCODER_BLOCKS[name])
    with engine_of(tiny_bert(), copy.deepcopy(config)) as engine:
        expected = train(engine, batches(STEPS))
        weights = full_weights(engine.module)
    model = init_compression(training_bert(), config)
    assert in_loop(model, config) == expected
    assert all(torch.equal(value, weights[key]) for key, value in full_weights(model).items())


def test_only_steps_of_an_optimizer_of_this_model_count() -> None:
    config = ds_config(0, sparse_pruning("l1", schedule_offset=2))
    model = init_compression(training_bert(), config)
    weight = model.bert.encoder.layer[0].attention.self.query.weight
    other = nn.Linear(2, 2)
    other(torch.ones(1, 2)).sum().backward()
    elsewhere = torch.optim.SGD(other.parameters(), lr=0.1)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = compression_scheduler(model, config)
    scheduler.step(step_zero_check=True)
    for _ in range(5):
        elsewhere.step()
        scheduler.step()
    assert scheduler.training_steps == 0
    for steps in (1, 2):
        model(**next(batches(1))).loss.backward()
        own.step()
        scheduler.step()
        scheduler.step()
        assert scheduler.training_steps == steps
        assert bool((weight == 0).any()) == (steps == 2)
    assert int((weight == 0).sum()) == weight.numel() // 2


def test_two_optimizers_share_a_step() -> None:
    config = ds_config(0, sparse_pruning("topk", schedule_offset=1))
    losses = []
    for split in (False, True):
        model = init_compression(training_bert(), config)
        scheduler = compression_scheduler(model, config)
        parameters = list(model.parameters())
        parts = [parameters[::2], parameters[1::2]] if split else [parameters]
        optimizers = [torch.optim.AdamW(part, lr=1e-3) for part in parts]
        losses.append([])
        for batch in batches(5):
            loss = model(**batch).loss
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            scheduler.step()
            losses[-1].append(loss.item())
        assert scheduler.training_steps == 5
    assert losses[0] == losses[1]


@pytest.mark.parametrize("name", ["everything", "sparse_pruning_topk", "activation_quantization_static"])
def test_a_resumed_loop_ends_bit_equal(name: str, tmp_path: Path) -> None:
    config = ds_config(0, ENCODER_BLOCKS[name])
    data, results = list(batches(12)), []
    for seed in (3, 7):
        model = init_compression(training_bert(seed=seed, layers=4 if name == "everything" else 2), config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = compression_scheduler(model, config)
        if seed == 3:
            in_loop(model, config, data[:6], scheduler, optimizer)
            state = (model.state_dict(), optimizer.state_dict(), scheduler.state_dict())
            torch.save(state, tmp_path / "state.pt")
        else:
            of_model, of_optimizer, of_scheduler = torch.load(tmp_path / "state.pt", weights_only=True)
            model.load_state_dict(of_model)
            optimizer.load_state_dict(of_optimizer)
            scheduler.load_state_dict(of_scheduler)
            assert scheduler.training_steps == 6
        losses = in_loop(model, config, data[6:], scheduler, optimizer)
        results.append((losses, full_weights(model), scheduler.training_steps))
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2] == 12
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_a_state_of_something_else_is_refused() -> None:
    config = ds_config(0, sparse_pruning("l1"))
    scheduler = compression_scheduler(init_compression(training_bert(), config), config)
    state = scheduler.state_dict()
    with pytest.raises(ValueError, match="the run has"):
        scheduler.load_state_dict({**state, "stages": {}})
    foreign = {"sparse_pruning": {"mask": {"elsewhere": torch.ones(3, dtype=torch.bool)}}}
    with pytest.raises(ValueError, match="elsewhere"):
        scheduler.load_state_dict({**state, "fragments": foreign})


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


def test_hooks_go_with_the_model() -> None:
    config = ds_config(0, sparse_pruning("l1"))
    gc.collect()
    before = len(loop._live)
    model = init_compression(training_bert(), config)
    scheduler = compression_scheduler(model, config)
    compression_scheduler(model, config)
    assert len(loop._live) == before + 1 and len(torch_optimizer._global_optimizer_pre_hooks) == 1
    del model, scheduler
    gc.collect()
    assert len(loop._live) == before


def test_bf16_weights_in_a_loop_keep_their_zeros() -> None:
    config = ds_config(0, sparse_pruning("l1", schedule_offset=1))
    model = init_compression(training_bert(), config).to(torch.bfloat16)
    in_loop(model, config, batches(3))
    weight = model.bert.encoder.layer[1].attention.self.value.weight
    assert int((weight == 0).sum()) == weight.numel() // 2


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


def test_student_initialization_copies_and_does_not_ask_whether_it_is_enabled() -> None:
    student, teacher = tiny_bert(seed=1), tiny_bert(seed=2, layers=4)
    block = {"layer_reduction": {**REDUCTION["layer_reduction"], "enabled": False}}
    student_initialization(student, teacher, {"compression_training": block})
    own, theirs = student.state_dict(), teacher.state_dict()
    for name, value in own.items():
        source = name.replace("layer.1.", "layer.3.").replace("layer.0.", "layer.1.")
        assert torch.equal(value, theirs[source]), name


def test_names() -> None:
    model = tiny_bert()
    names, seen = get_module_name("g", model, "attention.self", set())
    assert names[:2] == [f"bert.encoder.layer.0.attention.self.{part}" for part in ("query", "key")]
    assert len(names) == 6 and seen == set(names)
    assert get_module_name("g", model, "attention.self", seen, verbose=False) == ([], seen)
    with pytest.raises(ValueError, match="group g"):
        get_module_name("g", model, "attention.self", seen)
    assert recursive_getattr(model, names[0]) is model.bert.encoder.layer[0].attention.self.query
    replacement = nn.Linear(32, 32)
    recursive_setattr(model, names[0], replacement)
    assert model.bert.encoder.layer[0].attention.self.query is replacement


def test_the_expanded_config_has_every_key_and_is_accepted_back() -> None:
    block = {**ENCODER_BLOCKS["weight_quantization_moq"], **sparse_pruning("snip_momentum")}
    config = ds_config(0, block)
    expanded = get_compression_config(config)
    shared = expanded["weight_quantization"]["shared_parameters"]
    assert shared["fp16_mixed_quantize"] is True and shared["quantize_change_ratio"] == 0.1
    assert expanded["sparse_pruning"]["shared_parameters"]["block_pattern"] == "4x1"
    assert expanded["activation_quantization"] == {
        "shared_parameters": {
            "enabled": False,
            "quantization_type": "symmetric",
            "range_calibration": "dynamic",
            "schedule_offset": 0,
        },
        "different_groups": {},
    }
    assert expanded["layer_reduction"] == {"enabled": False}
    assert get_quantize_enabled(config) and not get_quantize_enabled({"train_batch_size": 1})
    assert "shared_parameters" not in config  # the caller's dict is not filled in
    model = init_compression(training_bert(), config)
    compression_scheduler(model, expanded)
    methods = get_compress_methods(tiny_bert(), expanded)
    assert methods[0][2]["weight_quantization"]["target_bits"] == 8
    assert [len(found) for found in methods[0][0]] == [6]


def test_convert_conv1d_to_linear() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)).eval()
    model.transformer.h[0].requires_grad_(False)
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    assert convert_conv1d_to_linear(model, Conv1D) is model
    assert not any(isinstance(module, Conv1D) for module in model.modules())
    linear = model.transformer.h[0].attn.c_attn
    assert isinstance(linear, nn.Linear) and (linear.out_features, linear.in_features) == (48, 16)
    assert not linear.weight.requires_grad and not linear.training
    torch.testing.assert_close(model(ids).logits, expected)


def test_single_layers_prepared_and_fixed_by_hand() -> None:
    model = tiny_bert().train()
    config = ds_config(0, {**ENCODER_BLOCKS["weight_quantization"], **ENCODER_BLOCKS["row_pruning"]})
    methods = get_compress_methods(model, get_compression_config(config))
    compression_preparation(model, methods[:1], None)
    compression_preparation(model, methods[1:], None)
    module_replacement(model, "bert.pooler.dense")
    assert isinstance(model.bert.pooler.dense, LinearLayer_Compress)
    expected = init_compression(training_bert(), config)
    assert in_loop(model, config_of(model)) == in_loop(expected, config)
    intermediate, output = "bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.0.output.dense"
    batch = next(batches(1))
    logits = model.eval()(**batch).logits
    quantized = [name for found in (methods[0][0], methods[1][0]) for names in found for name in names]
    for name in quantized:
        fix_compression(model, name, methods[0][2])
    row = methods[2][2]
    kept = fix_compression(model, intermediate, row, dim_reduction=True)
    assert kept is not None and int(kept.sum()) == 48
    assert fix_compression(model, output, row, mask=kept, dim_reduction=True) is None
    assert model.get_submodule(intermediate).out_features == model.get_submodule(output).in_features == 48
    assert not any(isinstance(module, QATModule) for module in model.modules())
    torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-5, atol=1e-6)


def config_of(model: nn.Module) -> Any:
    from ds_compress.engine.registry import run_of

    session = run_of(model)
    assert session is not None
    return session.block


def test_fixed_channels() -> None:
    block = copy.deepcopy(CHANNELS)
    block["channel_pruning"]["shared_parameters"]["method"] = "l1"
    network = init_compression(ConvNet().train(), block)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = compression_scheduler(network, block)
    with pytest.raises(ValueError, match="has no mask"):
        fix_compression(network, "conv1", CHANNELS, dim_reduction=True)
    for batch in images(5):
        network(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    network.eval()
    pictures = images(1)[0][0]
    expected = network.logits(pictures)
    kept = fix_compression(network, "conv1", CHANNELS, dim_reduction=True)
    for name in ("norm", "conv2"):
        fix_compression(network, name, CHANNELS, mask=kept, dim_reduction=True)
    assert network.conv1.out_channels == network.norm.num_features == network.conv2.in_channels == 8
    # Masked channels had a zero bias behind their normalization, so nothing is lost.
    torch.testing.assert_close(network.logits(pictures), expected, rtol=1e-5, atol=1e-6)


def test_fixed_rows_of_a_conv1d() -> None:
    """GPT-2 stores its layers as [in, out]: rows are columns there."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout)).train()
    shared = {"enabled": True, "method": "l1", "schedule_offset": 1, "round_to": 1}
    group = {"params": {"dense_ratio": 0.5}, "modules": ["mlp.c_fc"], "related_modules": [["mlp.c_proj"]]}
    block = {"row_pruning": {"shared_parameters": shared, "different_groups": {"g": group}}}
    ids = torch.arange(12)[None]
    in_loop(init_compression(model, block), block, [{"input_ids": ids, "labels": ids}] * 2)
    expected = model.eval()(ids).logits
    kept = fix_compression(model, "transformer.h.0.mlp.c_fc", block, dim_reduction=True)
    fix_compression(model, "transformer.h.0.mlp.c_proj", block, mask=kept, dim_reduction=True)
    mlp = model.transformer.h[0].mlp
    assert (mlp.c_fc.nf, mlp.c_fc.nx, mlp.c_proj.nf, mlp.c_proj.nx) == (32, 16, 16, 32)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)
