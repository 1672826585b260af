"""A block that nothing reads is an error at `deepspeed.initialize`, wherever it stands and however it is spelt."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest

from ds_compress import ConfigError, plan
from ds_compress.config.schema.compression_training import block_classes
from ds_compress.config.schema.placement import misplaced
from tests.models import tiny_bert
from tests.multirank.common import ds_config, pruning_block

pytestmark = pytest.mark.usefixtures("single_process")

BLOCK = pruning_block()
PRUNING = BLOCK["sparse_pruning"]


MISTAKES = [
    ({"compresion_training": BLOCK}, "compresion_training"),
    ({"compression_trainning": BLOCK}, "compression_trainning"),
    ({"compression-training": BLOCK}, "compression-training"),
    ({"Compression_Training": BLOCK}, "Compression_Training"),
    ({"compression": BLOCK}, "compression"),
    ({"ds_compress": BLOCK}, "ds_compress"),
    ({"sparse_pruning": PRUNING}, "sparse_pruning"),
    ({"sparse_prunning": PRUNING}, "sparse_prunning"),
    ({"gradient_compression": {"enabled": True}}, "gradient_compression"),
    ({"distilation": {"enabled": True, "losses": {"logits": {}}}}, "distilation"),
    ({"weight_quantization": {"shared_parameters": {"enabled": True}}}, "weight_quantization"),
    (
        {"zero_optimization": {"stage": 1, "compression_training": BLOCK}},
        "zero_optimization.compression_training",
    ),
    ({"zero_optimization": {"stage": 1, "sparse_pruning": PRUNING}}, "zero_optimization.sparse_pruning"),
    ({"bf16": {"enabled": True, "compresion_training": BLOCK}}, "bf16.compresion_training"),
]


@pytest.mark.parametrize(("wrong", "path"), MISTAKES, ids=[path for _, path in MISTAKES])
@pytest.mark.parametrize("beside", [False, True])
def test_it_is_refused_with_the_place_where_it_belongs(
    wrong: dict[str, Any], path: str, beside: bool
) -> None:
    config = {**ds_config(1, BLOCK if beside else None), **wrong}
    model = tiny_bert()
    with pytest.raises(ConfigError) as caught:
        deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    (problem,) = caught.value.problems
    assert problem.path == path
    assert '"compression_training"' in problem.hint


def test_plan_says_the_same() -> None:
    with pytest.raises(ConfigError) as caught:
        plan(tiny_bert(), {"train_batch_size": 8, "sparse_pruning": PRUNING})
    (problem,) = caught.value.problems
    assert problem.path == "sparse_pruning"


def test_null_is_no_block(caplog: pytest.LogCaptureFixture) -> None:
    config = {**ds_config(1), "compression_training": None}
    model = tiny_bert()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    engine.destroy()
    assert "null" in caplog.text and "uncompressed" in caplog.text


def test_every_block_is_known_at_the_top_level() -> None:
    for block in block_classes():
        inner = {"shared_parameters": {}} if block == "weight_quantization" else {}
        (problem,) = misplaced({"train_batch_size": 1, block: inner})
        assert f'"{block}" inside' in problem.allowed


def test_what_deepspeed_has_itself_is_left_alone() -> None:
    """A config with every top-level key of DeepSpeed's documentation, its own `weight_quantization` among them."""
    own = [
        "train_batch_size", "optimizer", "scheduler", "communication_data_type", "prescale_gradients",
        "sparse_gradients",
        "fp16", "bf16", "amp", "torch_autocast", "gradient_clipping", "zero_optimization", "aio", "steps_per_print",
        "wall_clock_breakdown", "dump_state", "flops_profiler", "activation_checkpointing", "sparse_attention",
        "data_efficiency", "curriculum_learning", "tensorboard", "wandb", "csv_monitor", "comms_logger", "checkpoint",
        "data_types", "compile", "hybrid_engine", "elasticity", "autotuning", "pipeline", "tensor_parallel",
        "quantize_training", "eigenvalue", "progressive_layer_drop", "seq_parallel_communication_data_type",
    ]  # fmt: skip
    config: dict[str, Any] = {key: {"enabled": True, "seed": 3} for key in own}
    config["weight_quantization"] = {"post_init_quant": {"fc": {"num_bits": 4}}}
    assert list(misplaced(config)) == []
