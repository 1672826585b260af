"""The blocks of gradient and weight traffic: defaults, bad values, and what they do not go with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ds_compress
from ds_compress.config import parse_config
from ds_compress.engine.admission import unsupported_beside
from ds_compress.reduce.slices import Segment
from ds_compress.techniques.gradient_compression import is_lopsided


def test_defaults_are_those_that_the_lab_found() -> None:
    config = parse_config(
        {"gradient_compression": {"enabled": True}, "parameter_compression": {}, "robust_reduction": {}}
    )
    wire, weights, robust = config.gradient_compression, config.parameter_compression, config.robust_reduction
    assert wire is not None and weights is not None and robust is not None
    assert (wire.bits, wire.effective_block_size, wire.error_feedback) == (8, 512, False)
    assert (wire.piece_elements, wire.hierarchical, wire.warmup_steps) == (None, False, 0)
    assert wire.effective_error_feedback_bits is None
    assert (weights.enabled, weights.refresh_interval) == (False, 100)
    assert (robust.enabled, robust.rule, robust.max_malicious) == (False, "centered_clip", 1)


def test_int4_has_smaller_blocks_unless_told_otherwise() -> None:
    for settings, block in (({"bits": 4}, 128), ({"bits": 4, "block_size": 64}, 64)):
        wire = parse_config({"gradient_compression": settings}).gradient_compression
        assert wire is not None and wire.effective_block_size == block


@pytest.mark.parametrize(
    ("block", "path", "allowed"),
    [
        ({"gradient_compression": {"bits": 6}}, "gradient_compression.bits", "8 or 4"),
        ({"gradient_compression": {"block_size": 100}}, "gradient_compression.block_size", "multiple of 32"),
        ({"gradient_compression": {"block_size": 16384}}, "gradient_compression.block_size", "up to 8192"),
        ({"gradient_compression": {"piece_elements": 5}}, "gradient_compression.piece_elements", ">= 1024"),
        ({"gradient_compression": {"refresh_interval": 5}}, "gradient_compression.refresh_interval", "keys"),
        (
            {"gradient_compression": {"error_feedback_bits": 8}},
            "gradient_compression.error_feedback_bits",
            "absent",
        ),
        ({"robust_reduction": {"rule": "krum"}}, "robust_reduction.rule", "centered_clip"),
        ({"robust_reduction": {"outlier_ratio": 1}}, "robust_reduction.outlier_ratio", "> 1"),
        ({"robust_reduction": {"worker_momentum": 1}}, "robust_reduction.worker_momentum", "< 1"),
        ({"robust_reduction": {"max_malicious": -1}}, "robust_reduction.max_malicious", ">= 0"),
        (
            {"parameter_compression": {"refresh_interval": 0}},
            "parameter_compression.refresh_interval",
            ">= 1",
        ),
    ],
)
def test_bad_values_are_named(block: dict[str, Any], path: str, allowed: str) -> None:
    with pytest.raises(ds_compress.ConfigError) as error:
        parse_config(block)
    (problem,) = error.value.problems
    assert problem.path == f"compression_training.{path}"
    assert allowed in problem.allowed


@pytest.mark.parametrize("key", ["hierarchical", "error_feedback"])
def test_robust_rules_want_the_gradients_of_every_worker(key: str) -> None:
    block = {"gradient_compression": {"enabled": True, key: True}, "robust_reduction": {"enabled": True}}
    with pytest.raises(ds_compress.ConfigError, match=f"gradient_compression.{key}"):
        parse_config(block)
    block["robust_reduction"]["enabled"] = False
    parse_config(block)


def settings(stage: int, autocast: bool = False, sparse: bool = False, **zero: Any) -> Any:
    zero = {"stage": stage, "reduce_scatter": True, "use_multi_rank_bucket_allreduce": True, **zero}
    return SimpleNamespace(
        zero_config=SimpleNamespace(**zero),
        sparse_gradients_enabled=sparse,
        torch_autocast_enabled=autocast,
    )


@pytest.mark.parametrize(
    ("block", "ds_config", "path"),
    [
        ("gradient_compression", settings(0, sparse=True), "sparse_gradients"),
        (
            "robust_reduction",
            settings(2, use_multi_rank_bucket_allreduce=False),
            "zero_optimization.use_multi_rank_bucket_allreduce",
        ),
        ("gradient_compression", settings(3, reduce_scatter=False), "zero_optimization.reduce_scatter"),
        ("parameter_compression", settings(0), "compression_training.parameter_compression.enabled"),
        ("parameter_compression", settings(3, autocast=True), "torch_autocast.enabled"),
    ],
)
def test_what_deepspeed_settings_do_not_go_with_is_refused(block: str, ds_config: Any, path: str) -> None:
    (problem,) = unsupported_beside(parse_config({block: {"enabled": True}}), ds_config)
    assert problem.path == path
    assert not list(unsupported_beside(parse_config({block: {"enabled": False}}), ds_config))


def test_the_plan_says_what_travels() -> None:
    config = parse_config(
        {
            "gradient_compression": {"enabled": True, "bits": 4, "error_feedback": True, "warmup_steps": 10},
            "parameter_compression": {"enabled": True, "measure_link": False},
            "robust_reduction": {"enabled": False},
        }
    )
    described = {name: block.describe() for name, block in config.enabled_blocks().items()}
    assert described == {
        "gradient_compression": "gradients, 4 bits in blocks of 128, from step 10, "
        "if the link is slow enough to gain, error feedback in 8 bits",
        "parameter_compression": "weights, 8 bits in blocks of 512, exact every 100 steps",
    }


@pytest.mark.parametrize(
    ("sizes", "lopsided"),
    [
        ([10, 10, 10, 10], False),
        ([20, 10, 10, 0], False),
        ([21, 10, 9, 0], True),
        ([40, 0, 0, 0], True),
        ([9, 0], False),
    ],
)
def test_a_bucket_of_one_owner_is_lopsided_unless_there_are_two(sizes: list[int], lopsided: bool) -> None:
    segments = [Segment(torch.zeros(size), owner) for owner, size in enumerate(sizes)]
    assert is_lopsided(segments, len(sizes)) is lopsided


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("world_size", [2, 8, 16, 17, 64, 4096])
def test_more_processes_are_sent_more_at_a_time(world_size: int, bits: int) -> None:
    block = parse_config({"gradient_compression": {"enabled": True, "bits": bits}}).gradient_compression
    assert block is not None
    chunk = block.chunk_elements(world_size)
    assert chunk * bits // 8 // world_size >= 1 << 16 and chunk >= 1 << 20
    assert chunk <= max(1 << 20, world_size << (16 if bits == 8 else 17)), "and no more"
    given = block.model_copy(update={"piece_elements": 4096})
    assert given.chunk_elements(world_size) == 4096
