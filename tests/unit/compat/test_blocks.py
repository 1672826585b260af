"""Every JSON of the old documentation, 20 steps: a plain loop through `compat`, and the engine without it, agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_compress.compat import compression_scheduler, init_compression, redundancy_clean
from tests.legacy_blocks import CHANNELS, ENCODER_BLOCKS, ConvNet, images
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, full_weights

pytestmark = pytest.mark.usefixtures("single_process")

STEPS = 20


def model_and_data(name: str) -> tuple[nn.Module, list[Any]]:
    if name == "channel_pruning":
        return ConvNet().train(), images(STEPS)
    layers = 4 if "layer_reduction" in ENCODER_BLOCKS[name] else 2
    return tiny_bert(layers=layers).train(), list(batches(STEPS))


def loss_of(model: Any, batch: Any) -> torch.Tensor:
    return model(**batch).loss if isinstance(batch, dict) else model(*batch)


@pytest.mark.parametrize("name", [*ENCODER_BLOCKS, "channel_pruning"])
def test_a_loop_and_an_engine_train_alike(name: str) -> None:
    block = CHANNELS if name == "channel_pruning" else ENCODER_BLOCKS[name]
    config = ds_config(0, block, gradient_clipping=0.0)  # which an engine does by default, at 1.0
    model, data = model_and_data(name)
    expected = []
    with engine_of(model, config) as engine:
        for batch in data:
            loss = loss_of(engine, batch)
            engine.backward(loss)
            engine.step()
            expected.append(loss.item())
        trained = full_weights(engine.module)
        metrics = engine.compression.metrics()

    model, data = model_and_data(name)
    init_compression(model, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = compression_scheduler(model, config)
    losses = []
    for batch in data:
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        losses.append(loss.item())
    assert losses == expected
    assert all(torch.equal(weight, trained[key]) for key, weight in full_weights(model).items())
    session = scheduler._run
    assert session is not None and session.metrics() == metrics

    size = sum(parameter.numel() for parameter in model.parameters())
    cleaned = redundancy_clean(model, config)
    removes = name in ("row_pruning", "row_pruning_l1", "head_pruning", "channel_pruning", "everything")
    assert (sum(parameter.numel() for parameter in cleaned.parameters()) < size) == removes
    assert torch.isfinite(loss_of(cleaned, data[0]))
