"""How a dropped layer is bypassed, and which layers go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_compress.engine.build import teacher_given
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, structured_block, train

pytestmark = pytest.mark.usefixtures("single_process")


def test_a_dropped_layer_hands_its_input_on() -> None:
    with engine_of(tiny_bert(layers=4), ds_config(0, {"depth_pruning": structured_block()})) as engine:
        train(engine, batches(2))
        stage = engine.compression.techniques["depth_pruning"]
        (kept,) = stage.kept.values()
        gone = sorted(set(range(4)) - set(kept.tolist()))
        hidden = torch.randn(1, 3, 32)
        output = engine.module.bert.encoder.layer[gone[0]](hidden)
        assert torch.equal(output[0] if isinstance(output, tuple) else output, hidden)


def test_a_dropped_layer_gets_gradients_of_zero() -> None:
    """None at all, and ZeRO-3 would go on with the last ones."""
    with engine_of(tiny_bert(layers=4), ds_config(3, {"depth_pruning": structured_block()})) as engine:
        train(engine, batches(2))
        (kept,) = engine.compression.techniques["depth_pruning"].kept.values()
        seen: dict[int, bool] = {}

        def look(*_: Any) -> None:
            for index in range(4):
                name = f"bert.encoder.layer.{index}.output.dense.weight"
                seen[index] = bool(engine.compression.shards.fragments[name].gradient.any())

        engine.basic_optimizer.register_step_pre_hook(look)
        train(engine, batches(1))
    assert [index for index, has_gradient in seen.items() if has_gradient] == kept.tolist()


def test_influence_prefers_the_layer_that_changes_most() -> None:
    model = tiny_bert(layers=4)
    with torch.no_grad():
        for index in (1, 3):  # weights of a fresh BERT are so small that its layers change nearly nothing
            layer = model.bert.encoder.layer[index]
            for dense in (layer.intermediate.dense, layer.output.dense):
                dense.weight.mul_(50)
    with engine_of(model, ds_config(0, {"depth_pruning": structured_block()})) as engine:
        train(engine, batches(2))
        (kept,) = engine.compression.techniques["depth_pruning"].kept.values()
    assert kept.tolist() == [1, 3]


def test_each_layer_goes_on_imitating_its_own() -> None:
    block = {
        "depth_pruning": structured_block(shrink_at_end_of_schedule=True),
        "distillation": {"enabled": True, "teacher_zero_stage": 0, "losses": {"hidden": {"weight": 1.0}}},
    }
    with teacher_given(tiny_bert(seed=1, layers=4)), engine_of(
        tiny_bert(layers=4), ds_config(2, block)
    ) as engine:  # fmt: skip
        engine.train()
        train(engine, batches(4))
        (kept,) = engine.compression.shrunk_units.values()
        distillation = engine.compression.techniques["distillation"]
        assert distillation._mapped == tuple(kept.tolist())
        assert distillation.metrics()["hidden"] > 0
        assert len(engine.module.bert.encoder.layer) == 2
