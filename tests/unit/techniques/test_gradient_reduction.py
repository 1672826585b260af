"""Reductions of one process: nothing to send, nothing changed, and everything given back."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch

from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, full_weights, pruning_block, train

pytestmark = pytest.mark.usefixtures("single_process")


def traffic_block() -> dict[str, Any]:
    return {
        "gradient_compression": {"enabled": True, "min_elements": 0},
        "robust_reduction": {"enabled": True, "max_malicious": 0},
    }


def engine_on(stage: int, block: dict[str, Any] | None, dtype: str = "fp32", **extra: Any) -> Any:
    model = tiny_bert()
    config = ds_config(stage, block, dtype, **extra)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


KINDS = ("gradient_compression", "robust_reduction", "parameter_compression")


@pytest.mark.parametrize(
    ("stage", "kind"), [(s, k) for s in range(4) for k in KINDS if (s, k) != (0, "parameter_compression")]
)
def test_one_process_trains_as_stock_does(stage: int, kind: str) -> None:
    stock = engine_on(stage, None)
    expected = train(stock, batches(3))
    weights = full_weights(stock.module)
    stock.destroy()
    block = {kind: {**traffic_block(), "parameter_compression": {"enabled": True}}[kind]}
    engine = engine_on(stage, block)
    assert train(engine, batches(3)) == expected
    ours = full_weights(engine.module)
    assert all(torch.equal(weights[name], ours[name]) for name in weights)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_detaching_gives_deepspeed_its_own_methods_back(stage: int) -> None:
    engine = engine_on(stage, {**traffic_block(), **pruning_block()})
    train(engine, batches(1))
    assert engine.compression.metrics()["gradient_reduction/worker_0_accused"] == 0
    engine.compression.detach()
    names = ("allreduce_bucket", "average_tensor", "allreduce_and_copy_with_multiple_ranks", "step")
    for holder in (engine, engine.optimizer):
        assert not set(names) & set(vars(holder))
        assert not any(name.endswith("__avg_scatter_grads") for name in vars(holder))
    train(engine, batches(1))
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_shrunk_engine_goes_on_reducing(stage: int) -> None:
    shared = {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 1, "shrink_at_end_of_schedule": True}
    block = {**traffic_block(), "row_pruning": {"shared_parameters": shared}}
    engine = engine_on(stage, block)
    before = engine.module.bert.encoder.layer[0].intermediate.dense.out_features
    train(engine, batches(4))
    assert engine.module.bert.encoder.layer[0].intermediate.dense.out_features == before // 2
    reduction = engine.compression.techniques["gradient_reduction"]
    assert reduction.flag_counts.steps > 0, "the new engine's steps"
    engine.destroy()
