"""What our own collectives cost a process among 64, 512 and 4,096, for test_thousands.py."""

from __future__ import annotations

from typing import Any

import torch

from ds_compress.reduce.codec import PlainCodec
from ds_compress.reduce.robust import Policy, RobustSum
from ds_compress.reduce.slices import Segment
from tests.multirank.simulated import as_threads, cost, one_of

WORLD_SIZES = (64, 512, 4096)
BUCKET = 100_000


def contribution(rank: int, numel: int = 5000) -> torch.Tensor:
    """The gradient of one worker."""
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank))


def robust() -> dict[str, Any]:
    """costs: of one bucket, by world size. threads: of 64 workers, what each ends with and decides by."""

    def reduce(x: torch.Tensor, policy: Policy) -> tuple[torch.Tensor, torch.Tensor]:
        grams: list[torch.Tensor] = []
        reduction = RobustSum(
            None, PlainCodec(torch.float32), policy, 1 << 20, lambda gram, _: grams.append(gram)
        )
        reduction.all_reduce([Segment(x, 0)])
        return x, grams[0]

    costs = {}
    for world_size in WORLD_SIZES:
        with one_of(world_size, rank=world_size // 2):
            costs[world_size] = cost(lambda: reduce(torch.ones(BUCKET), Policy("mean")))
            costs[world_size].result = None
    clipped = Policy("centered_clip", neighbor_mixing=False)
    return {"costs": costs, "threads": as_threads(64, lambda rank: reduce(contribution(rank), clipped))}


def run() -> dict[str, Any]:
    """All of them, in one launch."""
    return {"robust": robust()}
