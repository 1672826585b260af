"""One process of a job in a network lab: bytes that leave its host, per parameter and step, as a line of JSON."""

from __future__ import annotations

import json
import logging
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

import ds_compress  # noqa: F401
from benchmarks.netlab import bytes_sent
from tests.ending import end
from tests.multirank.common import ds_config, engine_of

WIDTH, LAYERS, STEPS = 768, 6, 3


class Wide(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(*[torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).float().square().mean()


def block(gradients: int | None, weights: int | None) -> dict[str, Any]:
    wish = {"enabled": True, "measure_link": False, "min_elements": 0}
    made: dict[str, Any] = {}
    if gradients:
        made["gradient_compression"] = {**wish, "bits": gradients}
    if weights:
        made["parameter_compression"] = {**wish, "bits": weights, "refresh_interval": 1000}
    return made


def measured(stage: int, gradients: int | None, weights: int | None) -> dict[str, float]:
    """Bytes per parameter and step: in backward (gradients only: at stage 3 all weights stay whole), and in all."""
    zero = {"stage3_param_persistence_threshold": 10**9} if stage == 3 else {}
    config = ds_config(stage, block(gradients, weights) or None, "bf16", zero)
    model = Wide()
    parameters = sum(p.numel() for p in model.parameters())
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(dist.get_rank())).bfloat16()
    backward = total = 0
    with engine_of(model, config) as engine:
        for step in range(-1, STEPS):
            dist.barrier()
            begin = bytes_sent()
            loss = engine(x)
            before = bytes_sent()
            engine.backward(loss)
            after = bytes_sent()
            engine.step()
            # What this process sent last may still wait in its queue; nobody gets here before it has arrived.
            dist.barrier()
            if step >= 0:
                backward += after - before
                total += bytes_sent() - begin
    return {"gradients": backward / parameters / STEPS, "total": total / parameters / STEPS}


def main() -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    found = {
        f"{stage} {gradients} {weights}": measured(stage, gradients, weights)
        for stage, gradients, weights in (
            *((stage, bits, None) for stage in (1, 2, 3) for bits in (None, 8, 4)),
            (2, 8, 8),
            (2, 4, 8),
            (2, 8, 4),
        )
    }
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found))
    end()


if __name__ == "__main__":
    main()
