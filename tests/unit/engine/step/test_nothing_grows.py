"""A step leaves nothing behind: as many graphs, and about as many bytes, are alive after ten steps as after six.

A graph that Python objects of its own nodes hold is a circle that no collector of garbage sees, because half of it is
C++; only counting finds it.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import ds_compress  # noqa: F401  (teaches DeepSpeed the key)
from tests.models import tiny_llama
from tests.multirank.common import ds_config, engine_of, pruning_block, weight_quantization
from tests.zoo.mixtures import mixture, tokens

pytestmark = pytest.mark.usefixtures("single_process")


def _distillation(**keys: Any) -> dict[str, Any]:
    return {"distillation": {"enabled": True, "self_teacher": {"weights": "initial"}, **keys}}


BLOCKS: dict[str, dict[str, Any]] = {
    "logits in chunks": _distillation(losses={"logits": {}}),
    "logits alone": _distillation(losses={"logits": {}}, task_loss_weight=0.0),
    "whole logits": _distillation(losses={"logits": {"chunk_tokens": 0}}),
    "logits and hidden states": _distillation(losses={"logits": {}, "hidden": {"weight": 0.5}}),
    "quantized": weight_quantization(8, "layers"),
    "pruned": {
        "sparse_pruning": {
            **pruning_block("movement", schedule_offset_end=20)["sparse_pruning"],
            "different_groups": {"all": {"params": {"dense_ratio": 0.5}, "modules": ["layers"]}},
        }
    },
}
ON_MIXTURES: dict[str, dict[str, Any]] = {
    "router": _distillation(losses={"logits": {}, "router": {"weight": 0.1}}),
    "experts pruned": {
        "expert_pruning": {
            "shared_parameters": {"enabled": True, "dense_ratio": 0.5, "schedule_offset": 2},
        }
    },
    "experts quantized": {"scheme": {"FP8_DYNAMIC": ["experts"]}},
}


def _alive() -> tuple[int, int]:
    """(nodes of graphs that Python wrote, bytes in tensors)."""
    gc.collect()
    objects = gc.get_objects()
    nodes = sum(type(o).__name__.endswith("Backward") for o in objects)
    storages = {}
    for o in objects:
        if type(o) in (torch.Tensor, torch.nn.Parameter):
            storages[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
    return nodes, sum(storages.values())


@pytest.mark.parametrize("block", [*BLOCKS, *ON_MIXTURES])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_nothing_grows(block: str, stage: int) -> None:
    model = mixture("qwen3_moe") if block in ON_MIXTURES else tiny_llama(vocab_size=64)
    config = ds_config(stage, {**BLOCKS, **ON_MIXTURES}[block])
    alive = []
    with engine_of(model.train(), config) as engine:
        for step in range(10):
            ids = tokens(4, 12, seed=step)
            loss = engine(input_ids=ids, labels=ids, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            if step in (5, 9):
                alive.append(_alive())
    (nodes, size), (nodes_then, size_then) = alive
    assert nodes_then == nodes
    # A graph that stays has a kilobyte and more; a number that somebody else keeps has a few bytes.
    assert abs(size_then - size) < 1024
