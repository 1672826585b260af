"""The helpers of the removed library: names, expanded configs, and layers prepared and fixed by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.compat import (
    compression_scheduler,
    convert_conv1d_to_linear,
    init_compression,
)
from ds_compress.compat.basic_layer import (
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
from ds_compress.quant.layers import QATModule
from tests.legacy_blocks import CHANNELS, ENCODER_BLOCKS, REDUCTION, ConvNet, images, sparse_pruning
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config
from tests.unit.compat.test_api import in_loop, training_bert

pytestmark = pytest.mark.usefixtures("single_process")


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
