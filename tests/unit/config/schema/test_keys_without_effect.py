"""A key that would change nothing is an error, as every key that is not known is; and so is a block without anybody."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest

import ds_compress
from ds_compress.config import parse_config
from ds_compress.config.schema.robust_reduction import RobustReductionConfig
from ds_compress.engine.admission import unsupported_beside
from tests.models import tiny_bert
from tests.multirank.common import ds_config
from tests.single import init_single_process

UNITS = (
    "row_pruning",
    "head_pruning",
    "channel_pruning",
    "depth_pruning",
    "hidden_pruning",
    "expert_pruning",
)


def shared(block: str, bits: int = 8, **settings: Any) -> dict[str, Any]:
    content: dict[str, Any] = {"shared_parameters": {"enabled": True, **settings}}
    if block == "weight_quantization":
        params = {"start_bits": bits, "target_bits": bits}
        content["different_groups"] = {"all": {"params": params}}
    elif block == "activation_quantization":
        content["different_groups"] = {"all": {"params": {"bits": 8}}}
    else:
        content["shared_parameters"].setdefault("dense_ratio", 0.5)
    return {block: content}


CASES: list[tuple[dict[str, Any], str]] = [
    *[
        (shared("sparse_pruning", method=method, momentum=0.9), "momentum")
        for method in ("l1", "topk", "taylor", "movement", "random")
    ],
    *[
        (shared("sparse_pruning", method=method, seed=1), "seed")
        for method in ("l1", "taylor", "movement")
    ],
    (shared("sparse_pruning", method="snip_momentum", schedule_offset_end=9, seed=1), "seed"),
    (shared("sparse_pruning", method="l1", schedule_offset_stride=5), "schedule_offset_stride"),
    *[
        (shared(block, method=method, seed=1), "seed")
        for block in UNITS
        for method in ("l1", "l2", "taylor", "reap" if block == "expert_pruning" else "activation")
    ],
    (shared("row_pruning", method="l1", schedule_offset_stride=5), "schedule_offset_stride"),
    (shared("weight_quantization", seed=1), "seed"),
    (shared("weight_quantization", rounding="nearest", seed=1), "seed"),
    (shared("weight_quantization", bits=2, narrow_range=True), "narrow_range"),
    (shared("weight_quantization", bits=1, rounding="stochastic"), "rounding"),
    *[
        (shared("activation_quantization", range_calibration="static", granularity=granularity), "granularity")
        for granularity in ("per_token", "per_tensor")
    ],
    (shared("activation_quantization", range_momentum=0.9), "range_momentum"),
    ({"robust_reduction": {"enabled": True, "rule": "mean", "neighbor_mixing": True}}, "neighbor_mixing"),
    ({"robust_reduction": {"enabled": True, "max_malicious": 0, "neighbor_mixing": True}}, "neighbor_mixing"),
]  # fmt: skip


@pytest.mark.parametrize(("block", "key"), CASES)
def test_a_key_that_changes_nothing_is_an_error(block: dict[str, Any], key: str) -> None:
    with pytest.raises(ds_compress.ConfigError) as error:
        parse_config(block)
    assert [problem.path.rpartition(".")[2] for problem in error.value.problems] == [key]
    (name,) = block
    content = block[name].get("shared_parameters", block[name])
    del content[key]
    parse_config(block)


@pytest.mark.parametrize(
    "block",
    [
        shared("sparse_pruning", method="snip_momentum", momentum=0.5, schedule_offset_end=9),
        shared("sparse_pruning", method="random", seed=1),
        shared("sparse_pruning", method="topk", seed=1, schedule_offset_stride=3),
        shared("sparse_pruning", method="l1", schedule_offset_stride=3, schedule_offset_end=9),
        *[shared(block, method="random", seed=1) for block in UNITS],
        shared("row_pruning", method="topk", seed=1),
        shared("weight_quantization", rounding="stochastic", seed=1),
        shared("activation_quantization", granularity="per_tensor"),
        {"robust_reduction": {"enabled": True, "rule": "median", "neighbor_mixing": True}},
    ],
)
def test_where_it_changes_something_it_is_taken(block: dict[str, Any]) -> None:
    parse_config(block)


def test_the_refresh_of_copies_is_refused_where_there_are_none() -> None:
    zero = SimpleNamespace(stage=3, reduce_scatter=True, use_multi_rank_bucket_allreduce=True)
    settings = SimpleNamespace(zero_config=zero, sparse_gradients_enabled=False, torch_autocast_enabled=False)
    block = {"parameter_compression": {"enabled": True, "refresh_interval": 10}}
    (problem,) = unsupported_beside(parse_config(block), settings)
    assert problem.path == "compression_training.parameter_compression.refresh_interval"
    zero.stage = 2
    assert not list(unsupported_beside(parse_config(block), settings))


@pytest.mark.parametrize("name", ["gradient_compression", "robust_reduction", "parameter_compression"])
def test_a_reduction_of_one_process_says_that_it_does_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    init_single_process()
    extra = {"max_malicious": 0} if name == "robust_reduction" else {}
    model = tiny_bert()
    with caplog.at_level(logging.WARNING, logger="ds_compress"):
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=ds_config(1, {name: {"enabled": True, **extra}}),
        )
    engine.destroy()
    (said,) = (m for m in caplog.messages if "one data-parallel process" in m)
    assert name in said


def test_what_no_rule_names_is_said() -> None:
    manual = RobustReductionConfig.__doc__ or ""
    for attack in ("opposite sign", "ALIE", "IPM"):
        assert attack in manual
    assert "not " in (RobustReductionConfig.model_fields["on_outlier"].description or "")
