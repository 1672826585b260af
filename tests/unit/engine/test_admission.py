"""What does not work together is refused at start, in words."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import pytest
import torch

import ds_compress
from tests.models import tiny_bert
from tests.multirank.common import ds_config, engine_of, pruning_block

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize(
    ("stage", "zero", "key"),
    [
        (3, {"zero_quantized_weights": True}, "zero_quantized_weights"),
        (3, {"zero_quantized_gradients": True}, "zero_quantized_gradients"),
        (3, {"zero_hpz_partition_size": 2}, "zero_hpz_partition_size"),
        (3, {"offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}, "offload_optimizer.device"),
        (3, {"offload_param": {"device": "nvme", "nvme_path": "/nowhere"}}, "offload_param.device"),
    ],
)
def test_zero_features_that_break_masks_are_refused(stage: int, zero: dict[str, Any], key: str) -> None:
    model = tiny_bert()
    with pytest.raises(ds_compress.ConfigError, match=key):
        deepspeed.initialize(
            model=model,
            model_parameters=model.parameters(),
            config=ds_config(stage, pruning_block(), zero=zero),
        )


def test_all_refusals_come_at_once() -> None:
    model = tiny_bert()
    zero = {"zero_quantized_weights": True, "zero_hpz_partition_size": 2}
    with pytest.raises(ds_compress.ConfigError) as error:
        deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(3, pruning_block(), zero=zero)
        )
    assert len(error.value.problems) == 2


def test_expert_parameters_are_refused() -> None:
    model = tiny_bert()
    model.classifier.weight.allreduce = False  # how DeepSpeed marks an expert's parameter
    with pytest.raises(ds_compress.ConfigError, match=r"classifier\.weight"):
        deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(0, pruning_block())
        )


def test_a_compiled_model_under_zero3_is_refused() -> None:
    """Plain DeepSpeed dies in its first forward: "'dict' object has no attribute '_in_forward'"."""
    model: Any = torch.compile(tiny_bert(), backend="aot_eager")
    with pytest.raises(ds_compress.ConfigError, match=r"engine\.compile\(\)"):
        deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=ds_config(3, pruning_block())
        )


def test_weights_that_tensor_parallelism_does_not_shard_cannot_be_pruned() -> None:
    """Each process would count them as its own."""
    from ds_compress.engine.admission import refuse_replicated
    from ds_compress.sharding.layer_shards import LayerShards

    with engine_of(tiny_bert(), ds_config(0, pruning_block())) as engine:
        session = engine.compression
        places = {name: (0, math.prod(target.shape)) for name, target in targets_of(session).items()}
        weights, techniques = session.plan.weights, session.techniques
        refuse_replicated(weights, techniques, LayerShards(None, places))
        replicated = places.popitem()[0]
        with pytest.raises(ds_compress.ConfigError, match=replicated.replace(".", r"\.")):
            refuse_replicated(weights, techniques, LayerShards(None, places))


def targets_of(session: Any) -> dict[str, Any]:
    return session.techniques["sparse_pruning"].targets


def test_a_pipeline_engine_is_refused() -> None:
    from ds_compress.engine.admission import refuse_unsupported

    class Config:
        class zero_config: ...

    with pytest.raises(ds_compress.ConfigError, match="PipelineEngine"):
        refuse_unsupported(tiny_bert(), "PipelineEngine", Config())
    refuse_unsupported(tiny_bert(), "DeepSpeedEngine", Config())
