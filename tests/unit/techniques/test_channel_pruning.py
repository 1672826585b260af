"""A convolution loses channels, and so does what reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ds_compress
from tests.multirank.common import ds_config, engine_of

pytestmark = pytest.mark.usefixtures("single_process")


def test_a_convolution_loses_channels() -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
            self.second, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.norm(self.first(x)))
            return self.head(self.second(x).relu().mean((2, 3)))

    group = {"modules": ["first"], "related_modules": [["norm", "second"]]}
    block = {
        "channel_pruning": {
            "shared_parameters": {"enabled": True, "schedule_offset": 1},
            "different_groups": {"g": {"params": {"dense_ratio": 0.5}, **group}},
        }
    }
    with engine_of(Net(), ds_config(0, block)) as engine:
        for _ in range(3):
            engine.backward(engine(torch.randn(4, 3, 8, 8)).square().mean())
            engine.step()
        engine.eval()
        images = torch.randn(2, 3, 8, 8)
        masked = engine(images).detach()
        final: Any = ds_compress.finalize(engine)
    assert (final.first.out_channels, final.norm.num_features, final.second.in_channels) == (8, 8, 8)
    torch.testing.assert_close(final(images), masked, rtol=1e-5, atol=1e-6)
