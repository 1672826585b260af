"""Scales that are parameters lose the outputs that their weights lose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from ds_compress.structure.given_scales import GivenScales
from tests.models import tiny_bert
from tests.multirank.common import batches, ds_config, engine_of, structured_block, train
from tests.multirank.structured import logits_of

GONE = {0: torch.tensor([1]), 1: torch.tensor([2, 3]), 2: torch.tensor([4])}


@pytest.mark.parametrize(
    ("given", "scales", "expected"),
    [
        (GivenScales("w", (4, 8), 0), (4,), {0: [1]}),
        (GivenScales("w", (4, 8), 0), (4, 2), {0: [1]}),
        (GivenScales("w", (8, 4), 1), (4,), {0: [2, 3]}),
        (GivenScales("w", (4, 8), 0), (1,), {}),
        (GivenScales("w", (4, 8, 6), 1, stacked=True), (4, 8), {0: [1], 1: [2, 3]}),
        (GivenScales("w", (4, 8, 6), 1, stacked=True), (4, 1), {0: [1]}),
        (GivenScales("w", (4, 8, 6), 1, stacked=True), (4, 8, 3), {0: [1], 1: [2, 3]}),
        (GivenScales("w", (4, 8, 6), 2, stacked=True), (4, 6), {0: [1], 1: [4]}),
        (GivenScales("w", (4, 8, 6), 2, stacked=True), (4, 2, 6), {0: [1], 2: [4]}),
    ],
)
def test_what_scales_lose(given: GivenScales, scales: tuple[int, ...], expected: dict[int, Any]) -> None:
    assert {dim: gone.tolist() for dim, gone in given.gone(GONE, scales).items()} == expected


@pytest.mark.usefixtures("single_process")
def test_a_finalized_model_computes_with_the_scales_of_what_is_left() -> None:
    shared = {
        "enabled": True,
        "quantize_weight_in_forward": True,
        "granularity": "per_channel",
        "learned_scale": True,
    }
    groups = {"e": {"params": {"start_bits": 8, "target_bits": 8}, "modules": ["encoder.layer"]}}
    block = {
        "row_pruning": structured_block(),
        "weight_quantization": {"shared_parameters": shared, "different_groups": groups},
    }
    model: nn.Module = tiny_bert()
    with engine_of(model, ds_config(0, block)) as engine:
        train(engine, batches(3))
        engine.eval()
        masked = logits_of(engine)
        final = ds_compress.finalize(engine)
    torch.testing.assert_close(logits_of(final), masked, rtol=1e-5, atol=1e-5)
