"""Bit-packed masks on a flat fragment of 25 million weights, beside everything that torch offers for it.

    python -m benchmarks.mask_apply [--quick] [--json] [--threads 1,2] [--device cuda]

- `mask_apply_` on weights that the mask changes, and on weights that it was applied to before (lines in which nothing
  changes are read, not written): the first is a step in which the mask is new, the second every step under that mask.
- N:M selection and packing, beside the references in plain torch.

On CUDA the same runs are timed between events.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ds_compress.ops import reference
from ds_compress.ops.library import native

from .bandwidth import COPY, Run, run_benchmark

NUMEL = 25_165_824
DENSITY = 0.5


def apply_runs(device: torch.device, dtype: torch.dtype, alternatives: bool) -> dict[str, Run]:
    ops = native()
    fresh = torch.randn(NUMEL, device=device).to(dtype)
    weights, target = fresh.clone(), torch.empty_like(fresh)
    keep = torch.rand(NUMEL, device=device) < DENSITY
    lost, factors, zero = ~keep, keep.to(dtype), torch.zeros((), dtype=dtype, device=device)
    packed = ops.mask_pack(keep)
    masked = fresh.clone()
    ops.mask_apply_(masked, packed)
    size = fresh.element_size()
    in_place = 2 * size * NUMEL + NUMEL // 8
    ours = "mask_apply_"

    def restore() -> None:
        weights.copy_(fresh)

    runs = {
        COPY: Run(lambda: target.copy_(fresh), 2 * size * NUMEL),
        ours: Run(lambda: ops.mask_apply_(weights, packed), in_place, restore),
        f"{ours}, applied before": Run(lambda: ops.mask_apply_(masked, packed), in_place),
        f"{ours}, 3 bits and elements off": Run(
            lambda: ops.mask_apply_(weights[3:-5], packed, 3), in_place, restore
        ),
        "mul_ by a float mask": Run(lambda: weights.mul_(factors), 3 * size * NUMEL, restore, peer_of=ours),
    }
    if alternatives:
        runs |= {
            "mul_ by a bool mask": Run(
                lambda: weights.mul_(keep), in_place + NUMEL * 7 // 8, restore, peer_of=ours
            ),
            "masked_fill_": Run(
                lambda: weights.masked_fill_(lost, 0.0), in_place + NUMEL * 7 // 8, restore, peer_of=ours
            ),
            "torch.where": Run(
                lambda: torch.where(keep, fresh, zero, out=target), in_place + NUMEL * 7 // 8, peer_of=ours
            ),
            "the reference in torch": Run(
                lambda: reference.mask.mask_apply_(weights, packed), in_place, restore, peer_of=ours
            ),
        }
    return runs


def selection_runs(device: torch.device) -> dict[str, Run]:
    ops, plain = native(), reference.mask
    numel = 1 << 22
    scores = torch.randn(4096, numel // 4096, device=device).abs_()
    flat, target = scores.view(-1), torch.empty(numel, device=device)
    keep = flat > 0.67
    packed = ops.mask_pack(keep)
    runs = {COPY: Run(lambda: target.copy_(flat), 8 * numel)}
    pairs: dict[str, tuple[Callable[[Any], object], int]] = {
        "mask_n_of_m 2:4": (lambda ops: ops.mask_n_of_m(scores, 2, 4), 4 * numel + numel // 8),
        "mask_pack": (lambda ops: ops.mask_pack(keep), numel + numel // 8),
        "mask_unpack": (lambda ops: ops.mask_unpack(packed, numel), numel + numel // 8),
    }
    for name, (call, moved) in pairs.items():
        runs[name] = Run(partial(call, ops), moved)
        runs[f"{name}, reference"] = Run(partial(call, plain), moved, peer_of=name)
    return runs


def cases(device: torch.device, quick: bool) -> Mapping[str, Callable[[], Mapping[str, Run]]]:
    made: dict[str, Callable[[], Mapping[str, Run]]] = {
        f"{NUMEL} fp32": lambda: apply_runs(device, torch.float32, alternatives=True),
        "selection, 4194304 fp32": lambda: selection_runs(device),
    }
    if not quick:
        made[f"{NUMEL} bf16"] = lambda: apply_runs(device, torch.bfloat16, alternatives=True)
    return made


if __name__ == "__main__":
    run_benchmark("mask_apply", __doc__ or "", cases, rounds=15, quick_rounds=5)
