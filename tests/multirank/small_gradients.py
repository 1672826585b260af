"""Parameters with gradients far smaller than their neighbours', run in two processes by test_small_gradients.py."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import ds_compress  # noqa: F401
from tests.multirank.common import device, ds_config, engine_of, full_weights

STEPS = 100
BLOCKS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "int4, stochastic": {"bits": 4, "rounding": "stochastic"},
}


class Gains(torch.nn.Module):
    """A matrix, and beside it in every bucket what moves its own loss a thousandth as much."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.before = torch.nn.Parameter(torch.ones(64))
        self.big = torch.nn.Parameter(torch.randn((64, 64), generator=generator) / 8)
        self.row = torch.nn.Parameter(torch.ones(1, 64))
        self.few = torch.nn.Parameter(torch.ones(2, 64))
        self.matrix = torch.nn.Parameter(torch.ones(32, 64))
        self.odd = torch.nn.Parameter(torch.ones(33, 61))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = 10 * (x @ self.big.T).square().mean()
        for gain in (self.before, self.row, self.few, self.matrix):
            loss = loss + 1e-2 * (gain.view(-1, 64) * x[:, None]).square().mean()
        return loss + 1e-2 * (self.odd * x[:, None, :61]).square().mean()


def moved(stage: int, block: dict[str, Any] | None, **extra: Any) -> dict[str, float]:
    """How far each parameter went on average; AdamW makes steps of one length of any gradient but 0."""
    wire = {"enabled": True, "measure_link": False, "min_elements": 0}
    blocks = None if block is None else {"gradient_compression": {**wire, **block}, **extra}
    adam = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True, "weight_decay": 0.0}}
    model = Gains()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with engine_of(model, ds_config(stage, blocks, optimizer=adam)) as engine:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
            engine.backward(engine(torch.randn((4, 64), generator=generator).to(device())))
            engine.step()
        last = full_weights(engine.module)
    return {name: float((last[name].cpu() - first[name]).abs().mean()) for name in first}


def run() -> dict[str, Any]:
    deepspeed.utils.logger.setLevel("ERROR")
    found: dict[str, Any] = {
        f"{stage} {name}": moved(stage, block) for stage in (0, 2, 3) for name, block in BLOCKS.items()
    }
    rule = {"enabled": True, "rule": "mean", "max_malicious": 0}
    for stage in (0, 2, 3):
        found[f"{stage} int4, robust"] = moved(stage, {"bits": 4}, robust_reduction=rule)
    return found
